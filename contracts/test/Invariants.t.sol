// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Swarm} from "../Swarm.sol";
import {Base, deploySwarm, keyOf, makeFounders, vm} from "./Base.t.sol";
import {Book} from "./Book.t.sol";

/// @dev Calls the contract at random, and its book with it. A call must succeed exactly when the book allows it, or
/// the handler itself reverts, and with it the test. (A refused call changes no slot: a revert undoes all it wrote.)
contract Handler is Book {
    Swarm public immutable swarm;
    uint256 private freshKeys = 0x9000;

    constructor() {
        ISwarm.Founder[] memory founders = makeFounders(5);
        swarm = deploySwarm(founders);
        for (uint256 i = 0; i < 5; ++i) {
            keys.push(founders[i].key);
            active[i] = true;
        }
        runs[1].terms = ISwarm.Terms(100, 50, 2, 0);
        runs[2].terms = ISwarm.Terms(40, 70, 4, 6_667);
        for (uint256 run = 1; run <= RUNS; ++run) {
            vm.prank(keys[0]);
            swarm.proposeRun(keccak256("spec"), runs[run].terms);
            runs[run].head = keccak256("spec");
        }
    }

    /// @dev Sends `data` as `caller`; the outcome must be `legal`.
    function send(address caller, bytes memory data, bool legal, string memory what) private returns (bool) {
        vm.prank(caller);
        (bool done,) = address(swarm).call(data);
        require(done == legal, what);
        return done;
    }

    function pick(uint256 run, uint256 site) private view returns (uint256, uint256) {
        return (run % RUNS + 1, who(site));
    }

    /// @dev The site that acts with the key of the site picked: a removed site's key may belong to another one now.
    function who(uint256 site) private view returns (uint256) {
        site %= keys.length;
        (bool found, uint256 owner) = siteOf(keys[site]);
        return found ? owner : site;
    }

    // ------------------------------------------------------------------ time

    function pass(uint256 seconds_) external {
        vm.warp(block.timestamp + (seconds_ % 20));
    }

    /// @dev Long stalls, now and then: several deadlines past at once, and proposals too.
    function stall(uint256 seconds_) external {
        if (seconds_ % 7 == 0) vm.warp(block.timestamp + (seconds_ % 3650 days));
    }

    // ------------------------------------------------------------------ membership

    function propose(uint256 site, uint256 what, uint256 about) public {
        site = who(site);
        ISwarm.Change kind = ISwarm.Change(what % 3);
        if (kind == ISwarm.Change.Admit && keys.length == SITES_MAX) return;
        address subject = about % 5 == 4 ? keyOf(777) : keys[about % keys.length];
        if (kind == ISwarm.Change.Admit && about % 5 != 0) subject = address(uint160(++freshKeys));
        bytes32 data = bytes32(what % 11 == 10 ? uint256(0) : ++freshKeys);
        bool legal = active[site] && isPossible(kind, subject, data);
        if (!send(keys[site], abi.encodeCall(ISwarm.propose, (kind, subject, data)), legal, "propose")) return;
        Proposal storage p = proposals.push();
        (p.kind, p.subject, p.data, p.deadline) = (kind, subject, data, block.timestamp + MONTH);
        p.approved[site] = true;
        write(p);
    }

    function approve(uint256 site, uint256 n) public {
        site = who(site);
        if (proposals.length == 0) return;
        n = n % proposals.length + 1;
        Proposal storage p = proposals[n - 1];
        bool before = p.approved[site];
        p.approved[site] = true; // to ask whether the majority is there
        bool carried = hasMajority(p) && active[site];
        if (carried && p.kind == ISwarm.Change.Admit && keys.length == SITES_MAX && !p.executed) {
            p.approved[site] = before;
            return; // no room in the book
        }
        bool legal = active[site] && !p.executed && block.timestamp < p.deadline
            && (!carried || isPossible(p.kind, p.subject, p.data));
        if (send(keys[site], abi.encodeCall(ISwarm.approve, (n)), legal, "approve")) write(p);
        else p.approved[site] = before;
    }

    /// @dev A change with all its votes, so that membership moves often.
    function carry(uint256 what, uint256 about) external {
        uint256 before = proposals.length;
        for (uint256 i = 0; i < keys.length && proposals.length == before; ++i) {
            if (active[i]) propose(i, what, about);
        }
        if (proposals.length == before) return;
        for (uint256 i = 0; i < keys.length; ++i) approve(i, before);
    }

    // ------------------------------------------------------------------ runs

    function join(uint256 run, uint256 site) public {
        (run, site) = pick(run, site);
        bool legal = active[site] && !runs[run].joined[site];
        if (send(keys[site], abi.encodeCall(ISwarm.joinRun, (run)), legal, "join")) writeJoined(run, site, true);
    }

    function leave(uint256 run, uint256 site) external {
        if (run % 3 != 0) return; // not too often
        (run, site) = pick(run / 3, site);
        bool legal = isJoined(run, site);
        if (send(keys[site], abi.encodeCall(ISwarm.leaveRun, (run)), legal, "leave")) writeJoined(run, site, false);
    }

    function announce(uint256 run, uint256 site) external {
        (run, site) = pick(run, site);
        bool legal = isJoined(run, site);
        if (send(keys[site], abi.encodeCall(ISwarm.announce, (run)), legal, "announce")) {
            runs[run].announced[site] = true;
        }
    }

    // ------------------------------------------------------------------ rounds

    function open(uint256 run, uint256 site) public {
        (run, site) = pick(run, site);
        bool legal = mayOpen(run, site);
        if (send(keys[site], abi.encodeCall(ISwarm.openRound, (run)), legal, "open")) writeOpened(run);
    }

    function commit(uint256 run, uint256 site, bytes32 commitment) public {
        (run, site) = pick(run, site);
        bytes memory data = abi.encodeCall(ISwarm.commit, (run, runs[run].rounds.length, commitment));
        if (send(keys[site], data, mayCommit(run, site, commitment), "commit")) writeCommitted(run, site, commitment);
    }

    function vote(uint256 run, uint256 site, uint256 choice, bool accept) public {
        (run, site) = pick(run, site);
        uint256 n = runs[run].rounds.length;
        bytes32 checkpoint = checkpointFor(run, choice);
        bytes memory data = abi.encodeCall(ISwarm.vote, (run, n, checkpoint, manifestOf(checkpoint), accept, 5_000));
        if (send(keys[site], data, mayVote(run, site), "vote")) {
            writeVote(run, site, Ballot(true, accept, checkpoint));
        }
    }

    /// @dev The same two results in every round, so that a vote that outlives its round would be seen.
    function checkpointFor(uint256 run, uint256 choice) public pure returns (bytes32) {
        return keccak256(abi.encode("checkpoint", run, choice & 2));
    }

    /// @dev A whole round, as agents play it, so that runs get long: everyone comes, and votes as `choices` says, some
    /// of them twice.
    function play(uint256 run, uint256 choices) external {
        for (uint256 i = 0; i < keys.length; ++i) {
            if (active[i] && choices & (1 << i) != 0 && !runs[run % RUNS + 1].joined[i]) join(run, i);
        }
        (ISwarm.Phase phase,) = phaseOf(run % RUNS + 1, runs[run % RUNS + 1].rounds.length);
        if (phase == ISwarm.Phase.Commit || phase == ISwarm.Phase.Vote) vm.warp(block.timestamp + 150);
        open(run, choices >> 8);
        uint256 coming = choices % 5 == 0 ? 1 : keys.length; // a lonely commitment is no round
        for (uint256 i = 0; i < coming; ++i) commit(run, i, keccak256(abi.encode(choices, i)));
        if (coming == 1) vm.warp(block.timestamp + 100);
        for (uint256 i = 0; i < 2 * keys.length; ++i) {
            uint256 bits = choices >> (16 + 3 * i);
            vote(run, i + (bits & 1), bits & 2, bits & 4 != 0 || choices % 3 != 0);
        }
    }

    function actInAnotherRound(uint256 run, uint256 site, uint256 n) external {
        (run, site) = pick(run, site);
        if (n == runs[run].rounds.length) return;
        send(keys[site], abi.encodeCall(ISwarm.vote, (run, n, "c", "m", true, 1)), false, "voted in another round");
        send(keys[site], abi.encodeCall(ISwarm.commit, (run, n, "c")), false, "committed in another round");
    }

    /// @dev Whoever is no site changes nothing, whatever is called; nor does a site that was removed.
    function intrude(address outsider, uint256 run, uint256 what) external {
        (bool found,) = siteOf(outsider);
        if (found) return;
        run = run % RUNS + 1;
        uint256 n = runs[run].rounds.length;
        bytes[10] memory calls = [
            abi.encodeCall(ISwarm.propose, (ISwarm.Change.Admit, outsider, "me")),
            abi.encodeCall(ISwarm.approve, (proposals.length)),
            abi.encodeCall(ISwarm.setSealKey, ("mine")),
            abi.encodeCall(ISwarm.proposeRun, ("x", ISwarm.Terms(10, 10, 1, 0))),
            abi.encodeCall(ISwarm.joinRun, (run)),
            abi.encodeCall(ISwarm.leaveRun, (run)),
            abi.encodeCall(ISwarm.announce, (run)),
            abi.encodeCall(ISwarm.openRound, (run)),
            abi.encodeCall(ISwarm.commit, (run, n, "x")),
            abi.encodeCall(ISwarm.vote, (run, n, "c", "m", true, 1))
        ];
        send(outsider, calls[what % 10], false, "an outsider got through");
        for (uint256 i = 0; i < keys.length; ++i) {
            (found,) = siteOf(keys[i]);
            if (!found) send(keys[i], calls[what % 10], false, "a removed site got through");
        }
    }
}

contract InvariantsTest is Base {
    Handler private handler;

    function setUp() public override {
        vm.warp(START);
        handler = new Handler();
        swarm = handler.swarm();
    }

    /// @dev forge calls nothing but the handler.
    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function invariant_members_are_the_books() external view {
        uint256 n = handler.keyCount();
        assertEq(swarm.siteCount(), n, "sites");
        uint256 mask;
        for (uint256 i = 0; i < n; ++i) {
            assertEq(swarm.siteAt(i).key, handler.keyAt(i), "key");
            if (!handler.isActive(i)) continue;
            mask |= 1 << i;
            assertEq(swarm.siteOf(handler.keyAt(i)), i, "index");
        }
        assertEq(swarm.activeSites(), mask, "active");
        assertEq(swarm.proposalCount(), handler.proposalCount(), "proposals");
        for (uint256 p = 1; p <= handler.proposalCount(); ++p) {
            (bool executed, uint256 approvals) = handler.proposalAt(p);
            ISwarm.Proposal memory found = swarm.proposalAt(p);
            assertTrue(found.executed == executed && found.approvals == approvals, "proposal");
        }
    }

    function invariant_view_is_the_book() external view {
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            ISwarm.RunView memory v = swarm.viewRun(r, 0);
            uint256 n = handler.roundCount(r);
            assertEq(v.round, n, "round");
            (ISwarm.Phase phase, ISwarm.Outcome outcome) = handler.phaseOf(r, n);
            assertTrue(v.phase == phase && v.outcome == outcome, "phase");
            uint256 joined;
            for (uint256 i = 0; i < handler.keyCount(); ++i) joined |= handler.isJoined(r, i) ? 1 << i : 0;
            assertEq(v.joined, joined, "joined");
            if (n == 0) continue;
            (uint256 quorum, uint256 commitEnd, uint256[5] memory masks, bytes32[8] memory commitments) =
                handler.roundAt(r, n);
            assertEq(v.quorum, quorum, "quorum");
            assertEq(v.commitDeadline, commitEnd, "commit deadline");
            assertEq(v.members, masks[0], "members");
            assertEq(v.expected, masks[1], "expected");
            assertEq(v.committed, masks[2], "committed");
            assertEq(v.voted, masks[3], "voted");
            assertEq(v.rejecting, masks[4], "rejecting");
            (uint256 failures, uint256 rejections) = handler.failuresBefore(r, n);
            assertEq(v.failures, failures, "failures");
            assertEq(v.rejections, rejections, "rejections");
            for (uint256 i = 0; i < v.commitments.length; ++i) {
                assertEq(v.commitments[i], commitments[i], "commitment");
            }
        }
    }

    function invariant_tallies_are_the_books() external view {
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            for (uint256 choice = 0; choice < 4; choice += 2) {
                bytes32 checkpoint = handler.checkpointFor(r, choice);
                uint256 accepting = swarm.acceptingOf(r, checkpoint, handler.manifestOf(checkpoint));
                assertEq(accepting, handler.acceptingIn(r, checkpoint), "accepting");
            }
        }
    }

    function invariant_outcomes_of_past_rounds_never_change() external view {
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            for (uint256 n = 1; n <= handler.roundCount(r); ++n) {
                (ISwarm.Phase phase, ISwarm.Outcome outcome) = swarm.phaseAt(r, n, block.timestamp);
                (ISwarm.Phase phase_, ISwarm.Outcome outcome_) = handler.phaseOf(r, n);
                assertTrue(phase == phase_ && outcome == outcome_, "a past round changed");
            }
        }
    }

    function invariant_head_chains_the_finalized_rounds() external view {
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            ISwarm.RunView memory v = swarm.viewRun(r, 0);
            (bytes32 head, uint256 finalized, bytes32 checkpoint) = handler.headOf(r);
            assertEq(v.head, head, "head");
            assertEq(v.finalizedRound, finalized, "finalized round");
            assertEq(v.checkpoint, checkpoint, "checkpoint");
            assertEq(v.manifest, finalized == 0 ? bytes32(0) : handler.manifestOf(checkpoint), "manifest");
        }
    }

    function invariant_masks_lie_within_each_other() external view {
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            ISwarm.RunView memory v = swarm.viewRun(r, 0);
            assertEq(v.joined & ~swarm.activeSites(), 0, "joined without being active");
            assertEq(v.expected & ~v.members, 0, "expected without being members");
            assertEq((v.committed | v.voted) & ~v.members, 0, "no members");
            assertEq(v.rejecting & ~v.voted, 0, "rejecting without a vote");
        }
    }

    /// @dev What a majority finalized keeps it, and what was rejected has no quorum left.
    function invariant_decisions_keep_their_votes() external view {
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            ISwarm.RunView memory v = swarm.viewRun(r, 0);
            if (v.outcome == ISwarm.Outcome.Finalized) {
                uint256 accepting = swarm.acceptingOf(r, v.checkpoint, v.manifest);
                assertTrue(countBits(accepting) >= v.quorum, "finalized without a quorum");
                assertEq(v.finalizedRound, v.round, "of this round");
            }
            if (v.outcome == ISwarm.Outcome.Rejected) {
                assertTrue(countBits(v.rejecting) + v.quorum > countBits(v.members), "rejected too early");
            }
        }
    }

    /// @dev No removal leaves a run that could go on without sites enough to do so.
    function invariant_runs_that_can_go_on_have_sites_enough() external view {
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            ISwarm.RunView memory v = swarm.viewRun(r, 0);
            if (countBits(v.joined) >= v.terms.sitesMin) {
                assertTrue(countBits(swarm.activeSites()) >= v.terms.sitesMin, "stranded");
            }
        }
        assertTrue(swarm.activeSites() != 0, "nobody left");
    }

    /// @dev Liveness: once both windows are past, any joined site can open the next round, also after ten years.
    function invariant_any_joined_site_can_always_go_on() external {
        uint256 now_ = block.timestamp;
        for (uint256 r = 1; r <= handler.RUNS(); ++r) {
            ISwarm.RunView memory v = swarm.viewRun(r, 0);
            if (countBits(v.joined) < v.terms.sitesMin) continue;
            for (uint256 site = 0; site < handler.keyCount(); ++site) {
                if (!handler.isJoined(r, site)) continue;
                uint256 both = v.voteDeadline > now_ ? v.voteDeadline : now_;
                vm.warp(site % 2 == 0 ? both : now_ + 3650 days);
                (bool done,) = address(this).call(abi.encodeCall(this.tryOpen, (r, site)));
                assertTrue(!done, "a joined site cannot open");
            }
            vm.warp(now_);
        }
    }

    /// @dev Opens and undoes it by reverting; returns if it could not open.
    function tryOpen(uint256 r, uint256 site) external {
        vm.prank(handler.keyAt(site));
        try swarm.openRound(r) {
            revert("opened");
        } catch {}
    }

    function countBits(uint256 mask) private pure returns (uint256 n) {
        for (; mask != 0; mask &= mask - 1) ++n;
    }
}
