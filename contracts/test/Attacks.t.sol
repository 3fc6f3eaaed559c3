// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Swarm} from "../Swarm.sol";
import {Base, deploySwarm, makeFounders, vm} from "./Base.t.sol";

/// @dev What earlier contracts of this kind fell to, one test each. Beside each stands the hole, as a change of our
/// source ("mutant FILE: `old` => `new`"); tests/test_mutants.py makes every one of them and sees its test fail.
contract AttacksTest is Base {
    // ------------------------------------------------------------------ commitments

    /// A commitment taken from another site opens for that site only, so the copier is not counted.
    /// mutant Rounds.sol: `run, round, site, digest` => `run, round, digest`
    function test_attack_copied_update_counts_for_nobody_else() public view {
        assertTrue(commitment(run, 1, 0, 5) != commitment(run, 1, 1, 5), "bound to the site");
    }

    /// mutant Rounds.sol: `block.chainid, address(this)` => `address(this)`
    function test_attack_commitment_of_another_chain() public {
        bytes32 here = commitment(run, 1, 0, 5);
        vm.chainId(99);
        assertTrue(here != commitment(run, 1, 0, 5), "bound to the chain");
    }

    /// mutant Rounds.sol: `block.chainid, address(this)` => `block.chainid`
    function test_attack_commitment_of_another_contract() public {
        bytes32 here = commitment(run, 1, 0, 5);
        swarm = deploySwarm(makeFounders(SITES));
        assertTrue(here != commitment(run, 1, 0, 5), "bound to the contract");
    }

    /// mutant Rounds.sol: `run, round, site, digest` => `run, site, digest`
    function test_attack_commitment_of_another_round() public view {
        assertTrue(commitment(run, 1, 0, 5) != commitment(run, 2, 0, 5), "bound to the round");
    }

    /// mutant Rounds.sol: `run, round, site, digest` => `round, site, digest`
    function test_attack_commitment_of_another_run() public view {
        assertTrue(commitment(run, 1, 0, 5) != commitment(run + 1, 1, 0, 5), "bound to the run");
    }

    /// mutant Rounds.sol: `digest, samples, salt)` => `digest, salt)`
    function test_attack_samples_inflated_after_the_fact() public view {
        assertTrue(commitment(run, 1, 0, 5) != commitment(run, 1, 0, 500), "bound to the samples");
    }

    /// Without the salt, whoever guesses a digest (of a parent resent, say) could tell what was committed.
    /// mutant Rounds.sol: `digest, samples, salt)` => `digest, samples)`
    function test_attack_commitment_guessed_before_its_opening() public view {
        bytes32 salted = swarm.computeCommitment(run, 1, 0, C1, 5, "one");
        assertTrue(salted != swarm.computeCommitment(run, 1, 0, C1, 5, "two"), "bound to the salt");
    }

    /// Whoever sends a copy first gains nothing, and does not keep its author out.
    /// mutant Rounds.sol: `committed |= Bits.bit(site);` => `for (uint256 i = 0; i < SITES_MAX; ++i) if (r.commitments[i] == commitment) revert AlreadyCommitted(round, site); committed |= Bits.bit(site);`
    function test_attack_digest_copied_first_to_block_its_author() public {
        open(0);
        bytes32 own = commitment(run, 1, 1, 5);
        vm.prank(key(0));
        swarm.commit(run, 1, own);
        vm.prank(key(1));
        swarm.commit(run, 1, own);
        assertEq(view_().committed, 3, "both");
    }

    /// mutant Rounds.sol: `revert AlreadyCommitted(round, site);` => ``
    function test_attack_commitment_exchanged_after_others_are_known() public {
        open(0);
        commit(0, 1);
        (bool done,) = attempt(key(0), abi.encodeCall(ISwarm.commit, (run, 1, C2)));
        assertTrue(!done, "the first one stands");
    }

    /// mutant Rounds.sol: `if (phase != Phase.Commit) revert WrongPhase(phase, Phase.Commit);` => ``
    function test_attack_commitment_after_the_openings() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        pass(100);
        (bool done,) = attempt(key(3), abi.encodeCall(ISwarm.commit, (run, 1, C2)));
        assertTrue(!done, "too late");
    }

    // ------------------------------------------------------------------ votes

    /// mutant Membership.sol: `if (indexPlusOne == 0) revert NotSite(key);` => `if (indexPlusOne == 0) return 0;`
    function test_attack_outsider_ends_a_round() public {
        open(0);
        commitAll(1);
        vote(1, 1, C2, true);
        vote(2, 1, C2, true);
        (bool done, bytes memory answer) = attempt(OUTSIDER, abi.encodeCall(ISwarm.vote, (run, 1, C2, M1, true, 0)));
        assertTrue(!done && bytes4(answer) == ISwarm.NotSite.selector, "refused");
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    /// mutant Rounds.sol: `return (s.with(ASTRAY), cast.count());` => `return (s.with(ASTRAY), cast.count() + (astray & own != 0 ? 1 : 0));`
    function test_attack_ballot_repeated_without_limit() public {
        open(0);
        commitAll(1);
        for (uint256 i = 0; i < 5; ++i) vote(0, 1, C1, false);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // one site is one vote
        for (uint256 i = 0; i < 5; ++i) vote(0, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    /// mutant Rounds.sol: `if (checkpoint == 0 || manifest == 0) revert EmptyDigest(run, round);` => ``
    function test_attack_empty_ballot() public {
        open(0);
        commitAll(1);
        (bool done,) = attempt(key(0), abi.encodeCall(ISwarm.vote, (run, 1, 0, 0, true, 0)));
        assertTrue(!done, "no empty result can be accepted");
    }

    /// mutant Rounds.sol: `Phases.quorumOf(members.count(), s.get(QUORUM_BPS))` => `Phases.quorumOf(expected.count(), s.get(QUORUM_BPS))`
    function test_attack_quorum_of_those_who_turned_up() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        pass(150);
        open(0); // sites 0 and 1 alone are expected
        commit(0, 2);
        commit(1, 2);
        vote(0, 2, C1, true);
        vote(1, 2, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // all who turned up, but no majority of the members
    }

    /// mutant Rounds.sol: `if (round == 0 || round != s.get(ROUND)) revert WrongRound(round, s.get(ROUND));` => `if (round == 0 || round > s.get(ROUND)) revert WrongRound(round, s.get(ROUND));`
    function test_attack_vote_for_a_past_round() public {
        open(0);
        finalize(1, C1);
        open(0);
        commitAll(2);
        (bool done,) = attempt(key(3), abi.encodeCall(ISwarm.vote, (run, 1, C2, M1, true, 0)));
        assertTrue(!done, "past is past");
    }

    /// A liar can only vote for a digest that nobody else computed.
    /// mutant Rounds.sol: `if (accept && votes >= s.get(QUORUM))` => `if (accept)`
    function test_attack_lying_merge() public {
        open(0);
        commitAll(1);
        vote(3, 1, C2, true);
        for (uint256 i = 0; i < 2; ++i) vote(i, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        vote(2, 1, C1, true);
        assertEq(view_().checkpoint, C1, "what the honest computed");
    }

    /// mutant Rounds.sol: `bool late = !hasVoted && s.outcome()` => `bool late = s.outcome()`
    function test_attack_votes_withdrawn_from_a_final_result() public {
        open(0);
        finalize(1, C1);
        (bool done,) = attempt(key(0), abi.encodeCall(ISwarm.vote, (run, 1, C2, M1, true, 0)));
        assertTrue(!done, "what decided a round stays");
    }

    /// mutant Rounds.sol: `if (s.outcome() == Outcome.Pending) {` => `{`
    function test_attack_decision_overturned() public {
        startRun(100, 50, 2, 0, 3);
        open(0);
        for (uint256 i = 0; i < 3; ++i) commit(i, 1);
        vote(0, 1, C1, true);
        vote(1, 1, C1, true);
        bytes32 head = view_().head;
        vote(2, 1, C1, true);
        assertEq(view_().head, head, "final once");
    }

    // ------------------------------------------------------------------ time

    /// A withheld opening, or a site that never comes, holds a round up for one window at most.
    /// mutant Phases.sol: `if (t < get(s, COMMIT_END)) return (ISwarm.Phase.Commit, ISwarm.Outcome.Pending);` => `if (!has(s, ENOUGH) || t < get(s, COMMIT_END)) return (ISwarm.Phase.Commit, ISwarm.Outcome.Pending);`
    function test_attack_withheld_commitment_stops_nothing() public {
        open(0);
        commit(0, 1);
        pass(100);
        open(1);
        assertEq(view_().round, 2, "the next round");
    }

    /// mutant Phases.sol: `if (has(s, ENOUGH) && t < voteDeadline(s))` => `if (has(s, ENOUGH))`
    function test_attack_withheld_vote_stops_nothing() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, true);
        pass(50);
        open(3);
        assertEq(view_().round, 2, "the next round");
    }

    /// mutant Rounds.sol: `r.outcomes[s.get(ROUND) >> 7] |=` => `for (uint256 i = 1; i < s.get(ROUND); ++i) if (r.outcomes[i >> 7] == 0) revert EmptyDigest(run, i); r.outcomes[s.get(ROUND) >> 7] |=`
    function test_attack_cost_grows_with_history() public {
        uint256 early;
        for (uint256 round = 1; round <= 100; ++round) {
            vm.cool(address(swarm));
            uint256 before = gasleft();
            open(0);
            finalize(round, C1);
            uint256 used = before - gasleft();
            if (round == 2) early = used;
            if (round > 2) assertTrue(used * 100 < early * 101, "no more than at first");
        }
    }

    // ------------------------------------------------------------------ membership

    /// mutant Membership.sol: `(p.approvals & active).count()` => `p.approvals.count()`
    function test_attack_approvals_of_removed_sites() public {
        swarm = deploySwarm(makeFounders(5));
        uint256 proposal = propose(3, ISwarm.Change.Admit, OUTSIDER, "friend");
        approve(4, proposal);
        for (uint256 i = 3; i < 5; ++i) {
            uint256 removal = propose(0, ISwarm.Change.Remove, key(i), 0);
            approve(1, removal);
            if (i == 3) approve(2, removal);
            else if (!swarm.proposalAt(removal).executed) approve(2, removal);
        }
        approve(0, proposal);
        assertEq(swarm.siteCount(), 5, "one of three active sites is no majority");
    }

    /// mutant Membership.sol: `if (block.timestamp >= p.deadline) revert ProposalExpired(proposal, p.deadline);` => ``
    function test_attack_proposal_that_never_expires() public {
        uint256 proposal = propose(3, ISwarm.Change.Admit, OUTSIDER, "friend");
        pass(365 days);
        for (uint256 i = 0; i < 3; ++i) attempt(key(i), abi.encodeCall(ISwarm.approve, (proposal)));
        assertEq(swarm.siteCount(), SITES, "forgotten is refused");
    }

    /// mutant Membership.sol: `if (p.executed) revert ProposalExecuted(proposal, p.kind);` => ``
    function test_attack_proposal_carried_out_twice() public {
        bytes32 fresh = bytes32(uint256(uint160(address(0x77))));
        uint256 proposal = change(ISwarm.Change.RotateKey, key(3), fresh);
        vm.prank(address(0x77));
        uint256 back = swarm.propose(ISwarm.Change.RotateKey, address(0x77), bytes32(uint256(uint160(key(3)))));
        approve(0, back);
        approve(1, back);
        (bool done,) = attempt(key(2), abi.encodeCall(ISwarm.approve, (proposal)));
        assertTrue(!done, "once");
        assertEq(swarm.siteOf(key(3)), 3, "the key stays");
    }

    /// There is nothing to initialise, and nothing to own.
    /// mutant Swarm.sol: `constructor(` => `function initialize(address) external { activeSites = 1; } constructor(`
    function test_attack_initialiser_left_open() public {
        string[7] memory doors = [
            "initialize(address)", "initialize()", "init(address)", "setOwner(address)",
            "transferOwnership(address)", "upgradeTo(address)", "setSites(address[])"
        ];
        for (uint256 i = 0; i < doors.length; ++i) {
            (bool done,) = attempt(OUTSIDER, abi.encodeWithSignature(doors[i], OUTSIDER));
            assertTrue(!done, doors[i]);
            (done,) = attempt(key(0), abi.encodeWithSignature(doors[i], OUTSIDER));
            assertTrue(!done, doors[i]);
        }
    }

    /// mutant Membership.sol: `delete _indexOf[key];\n        activeSites &=` => `activeSites &=`
    function test_attack_removed_site_acts() public {
        open(0);
        commitAll(1);
        remove(3);
        bytes[8] memory calls = [
            abi.encodeCall(ISwarm.vote, (run, 1, C2, M1, false, 0)),
            abi.encodeCall(ISwarm.propose, (ISwarm.Change.Admit, OUTSIDER, "friend")),
            abi.encodeCall(ISwarm.approve, (1)),
            abi.encodeCall(ISwarm.proposeRun, (SPEC, ISwarm.Terms(1, 1, 1, 0))),
            abi.encodeCall(ISwarm.joinRun, (run)),
            abi.encodeCall(ISwarm.leaveRun, (run)),
            abi.encodeCall(ISwarm.announce, (run)),
            abi.encodeCall(ISwarm.setSealKey, ("mine"))
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            (bool done, bytes memory answer) = attempt(key(3), calls[i]);
            assertTrue(!done && bytes4(answer) == ISwarm.NotSite.selector, "silent");
        }
    }

    /// A stolen key is worthless from the rotation on.
    /// mutant Membership.sol: `delete _indexOf[key];\n        _indexOf[newKey]` => `_indexOf[newKey]`
    function test_attack_stolen_key_after_its_rotation() public {
        open(0);
        change(ISwarm.Change.RotateKey, key(3), bytes32(uint256(uint160(address(0x77)))));
        (bool done,) = attempt(key(3), abi.encodeCall(ISwarm.commit, (run, 1, C1)));
        assertTrue(!done, "the old key is nobody's");
    }

    /// Two sites that agree cannot make themselves irremovable by a run of their own.
    /// mutant Membership.sol: `_runsNeeding[active] != 0` => `runsOpen != 0`
    /// mutant Membership.sol: `uint256 public proposalCount;` => `uint256 public proposalCount; uint256 internal runsOpen = 1;`
    function test_attack_run_as_a_shield_against_removal() public {
        vm.prank(key(3));
        run = swarm.proposeRun(SPEC, ISwarm.Terms(100, 50, 2, 0));
        join(3);
        join(2);
        remove(3);
        assertEq(swarm.activeSites(), 7, "removed");
    }

    /// mutant Membership.sol: `if (active == 1 || _runsNeeding[active] != 0)` => `if (active == 1)`
    function test_attack_removal_that_strands_a_run() public {
        startRun(100, 50, 4, 0, SITES);
        (bool done,) = attempt(key(0), abi.encodeCall(ISwarm.propose, (ISwarm.Change.Remove, key(3), 0)));
        assertTrue(!done, "the run needs them all");
    }

    function commitment(uint256 run_, uint256 round, uint256 site, uint256 samples) internal view returns (bytes32) {
        return swarm.computeCommitment(run_, round, site, C1, samples, M1);
    }
}
