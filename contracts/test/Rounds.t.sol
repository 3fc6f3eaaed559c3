// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Bits} from "../Bits.sol";
import {ISwarm} from "../ISwarm.sol";
import {Phases} from "../Phases.sol";
import {Swarm} from "../Swarm.sol";
import {Base, deploySwarm, makeFounders, vm} from "./Base.t.sol";

contract RoundsTest is Base {
    function test_round_finalizes_with_a_majority() public {
        open(0);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
        commitAll(1);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        vote(0, 1, C1, true);
        vote(1, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // 2 of 4 are no majority
        vote(2, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
        ISwarm.RunView memory v = view_();
        require(v.checkpoint == C1 && v.manifest == M1, "result");
        require(v.head == keccak256(abi.encode(keccak256("spec"), uint256(1), C1, M1)), "head");
    }

    function test_round_is_rejected_when_no_majority_is_left() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, false);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        vote(1, 1, C1, false);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Rejected);
        open(1);
        assertEq(view_().rejections, 1, "rejections");
    }

    function test_round_expires_with_too_few_commitments() public {
        open(0);
        commit(0, 1);
        vm.warp(block.timestamp + 100);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
        open(3);
        assertEq(view_().failures, 1, "failures");
        assertEq(view_().expected, 1, "only site 0 came last time");
    }

    function test_dead_site_costs_one_window_once() public {
        open(0);
        for (uint256 i = 0; i < 3; ++i) commit(i, 1);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending); // site 3 is waited for
        vm.warp(block.timestamp + 100);
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        open(1);
        for (uint256 i = 0; i < 3; ++i) commit(i, 2);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    function test_announced_site_is_waited_for_again() public {
        test_dead_site_costs_one_window_once();
        vm.prank(key(3));
        swarm.announce(run);
        for (uint256 i = 0; i < 3; ++i) vote(i, 2, C1, true);
        open(0);
        assertEq(view_().expected, 15, "all four");
    }

    function test_vote_moves() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, true);
        vote(1, 1, C1, true);
        vote(0, 1, C2, true);
        assertEq(swarm.acceptingOf(run, C1, M1), 2, "site 1 alone");
        vote(2, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    function test_late_vote_changes_nothing() public {
        open(0);
        finalize(1, C1);
        vote(3, 1, C2, false);
        require(view_().checkpoint == C1 && view_().voted == 15, "recorded, without effect");
        vm.warp(block.timestamp + 50);
        vm.expectRevert(
            abi.encodeWithSelector(ISwarm.WrongPhase.selector, ISwarm.Phase.Closed, ISwarm.Phase.Vote)
        );
        vote(2, 1, C2, false);
    }

    function test_phase_of_past_rounds() public {
        open(0);
        finalize(1, C1);
        open(0);
        vm.warp(block.timestamp + 1_000);
        open(0);
        (, ISwarm.Outcome first) = swarm.phaseAt(run, 1, 0);
        (, ISwarm.Outcome second) = swarm.phaseAt(run, 2, 0);
        require(first == ISwarm.Outcome.Finalized && second == ISwarm.Outcome.Expired, "outcomes");
    }

    // ------------------------------------------------------------------ refusals

    function test_invalid_open_while_a_round_runs() public {
        open(0);
        vm.expectRevert(
            abi.encodeWithSelector(ISwarm.WrongPhase.selector, ISwarm.Phase.Commit, ISwarm.Phase.Closed)
        );
        open(1);
    }

    function test_invalid_open_with_too_few_sites() public {
        run = proposeRun(100, 50, 2, 0);
        join(0);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.TooFewSites.selector, 1, 2));
        open(0);
    }

    function test_invalid_second_commit() public {
        open(0);
        commit(0, 1);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.AlreadyCommitted.selector, 1, 0));
        commit(0, 1);
    }

    function test_invalid_empty_commitment_and_ballot() public {
        open(0);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.EmptyDigest.selector, run, 1));
        vm.prank(key(0));
        swarm.commit(run, 1, 0);
        commitAll(1);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.EmptyDigest.selector, run, 1));
        vote(0, 1, 0, true);
    }

    function test_invalid_score() public {
        open(0);
        commitAll(1);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.ScoreOutOfRange.selector, 10_001, 10_000));
        vm.prank(key(0));
        swarm.vote(run, 1, C1, M1, true, 10_001);
    }

    function test_invalid_member_who_joined_later() public {
        run = proposeRun(100, 50, 2, 0);
        join(0);
        join(1);
        open(0);
        join(2);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.NotMember.selector, 1, 2));
        commit(2, 1);
    }

    function test_invalid_terms() public {
        vm.expectRevert(abi.encodeWithSelector(ISwarm.WindowOutOfRange.selector, 0, 90 days));
        proposeRun(0, 50, 2, 0);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.SitesMinOutOfRange.selector, 5, 4));
        proposeRun(100, 50, 5, 0);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.QuorumOutOfRange.selector, 10_001, 10_000));
        proposeRun(100, 50, 2, 10_001);
    }

    function test_invalid_founders() public {
        ISwarm.Founder[] memory none = new ISwarm.Founder[](0);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.NoFounders.selector));
        deploySwarm(none);
        ISwarm.Founder[] memory twice = new ISwarm.Founder[](2);
        (twice[0], twice[1]) = (ISwarm.Founder(key(0), "a"), ISwarm.Founder(key(0), "b"));
        vm.expectRevert(abi.encodeWithSelector(ISwarm.SiteExists.selector, key(0), 0));
        deploySwarm(twice);
    }

    // ------------------------------------------------------------------ attacks

    function test_attack_outsider_changes_no_slot() public {
        open(0);
        bytes[5] memory calls = [
            abi.encodeCall(ISwarm.openRound, (run)),
            abi.encodeCall(ISwarm.commit, (run, 1, C1)),
            abi.encodeCall(ISwarm.vote, (run, 1, C1, M1, true, 0)),
            abi.encodeCall(ISwarm.joinRun, (run)),
            abi.encodeCall(ISwarm.announce, (run))
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            vm.record();
            vm.prank(OUTSIDER);
            (bool done, bytes memory reason) = address(swarm).call(calls[i]);
            require(!done, "refused");
            require(bytes4(reason) == ISwarm.NotSite.selector, "by name");
            (, bytes32[] memory writes) = vm.accesses(address(swarm));
            assertEq(writes.length, 0, "no write");
        }
    }

    function test_attack_quorum_counts_the_snapshot() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        vm.warp(block.timestamp + 100);
        vote(0, 1, C1, true);
        vote(1, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // all who turned up, but no majority of the members
    }

    function test_attack_empty_ballot_repeated() public {
        open(0);
        commitAll(1);
        for (uint256 i = 0; i < 5; ++i) vote(0, 1, C1, false);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // one site is one vote
    }

    function test_attack_vote_for_a_past_round() public {
        open(0);
        finalize(1, C1);
        open(0);
        commitAll(2);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.WrongRound.selector, 1, 2));
        vote(0, 1, C2, true);
    }

    function test_attack_copied_commitment_opens_to_somebody_else() public {
        bytes32 own = swarm.computeCommitment(run, 1, 0, C1, 5, M1);
        require(own != swarm.computeCommitment(run, 1, 1, C1, 5, M1), "site");
        require(own != swarm.computeCommitment(run, 2, 0, C1, 5, M1), "round");
        require(own != swarm.computeCommitment(run + 1, 1, 0, C1, 5, M1), "run");
        require(own != swarm.computeCommitment(run, 1, 0, C1, 6, M1), "samples");
        vm.chainId(99);
        require(own != swarm.computeCommitment(run, 1, 0, C1, 5, M1), "chain");
    }

    function test_attack_copy_sent_first_does_not_block_its_author() public {
        open(0);
        bytes32 own = swarm.computeCommitment(run, 1, 1, C1, 5, M1);
        vm.prank(key(0));
        swarm.commit(run, 1, own);
        vm.prank(key(1));
        swarm.commit(run, 1, own);
        assertEq(view_().committed, 3, "both");
    }

    function test_attack_cost_does_not_grow_with_history() public {
        uint256 early;
        for (uint256 round = 1; round <= 40; ++round) {
            uint256 before = gasleft();
            open(0);
            finalize(round, C1);
            uint256 used = before - gasleft();
            if (round == 3) early = used;
            if (round > 3) require(used < early + 30_000, "constant but for a word of outcomes");
        }
    }

    // ------------------------------------------------------------------ pure rules

    function testFuzz_count_of_bits(uint256 mask) public pure {
        uint256 slow;
        for (uint256 m = mask; m != 0; m &= m - 1) ++slow;
        assertEq(Bits.count(mask), slow, "popcount");
    }

    function testFuzz_quorum_is_a_majority_within_the_members(uint8 members, uint16 quorumBps) public pure {
        uint256 n = uint256(members) + 1;
        uint256 quorum = Phases.quorumOf(n, quorumBps % 10_001);
        require(quorum * 2 > n && quorum <= n, "majority");
    }

    function testFuzz_phases_follow_time(uint32 t) public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        uint256 at = 1_000_000 + uint256(t) % 400;
        ISwarm.RunView memory v = swarm.viewRun(run, at);
        ISwarm.Phase expected = at < 1_000_100
            ? ISwarm.Phase.Commit
            : at < 1_000_150 ? ISwarm.Phase.Vote : ISwarm.Phase.Closed;
        require(v.phase == expected, "phase");
    }

    /// @dev Outcomes are packed, 128 to a word: none may leak into another round's.
    function test_outcomes_of_three_hundred_rounds_stay_what_they_were() external {
        for (uint256 n = 1; n <= 300; ++n) {
            open(0);
            commitAll(n);
            if (n % 3 == 0) {
                vm.warp(block.timestamp + 50); // expired: nobody voted
                continue;
            }
            for (uint256 i = 0; i < 3; ++i) vote(i, n, C1, n % 3 == 1); // finalized or rejected
        }
        for (uint256 n = 1; n <= 300; ++n) {
            (, ISwarm.Outcome outcome) = swarm.phaseAt(run, n, block.timestamp);
            ISwarm.Outcome[3] memory outcomes =
                [ISwarm.Outcome.Expired, ISwarm.Outcome.Finalized, ISwarm.Outcome.Rejected];
            require(outcome == outcomes[n % 3], "outcome");
        }
    }
}
