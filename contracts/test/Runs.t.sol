// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Base, deploySwarm, makeFounders, vm} from "./Base.t.sol";

contract RunsTest is Base {
    uint256 internal constant WINDOW_MAX = 90 days;

    function terms() internal pure returns (ISwarm.Terms memory) {
        return ISwarm.Terms(100, 50, 2, 0);
    }

    // ------------------------------------------------------------------ propose

    function test_proposed_run_binds_nobody() public {
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RunProposed(2, "law", 3, ISwarm.Terms(7, 8, 2, 6_000));
        vm.prank(key(3));
        assertEq(swarm.proposeRun("law", ISwarm.Terms(7, 8, 2, 6_000)), 2, "counted from 1");
        run = 2;
        ISwarm.RunView memory v = view_();
        assertEq(v.spec, "law", "spec");
        assertEq(v.terms.commitWindow, 7, "commit window");
        assertEq(v.terms.voteWindow, 8, "vote window");
        assertEq(v.terms.sitesMin, 2, "sitesMin");
        assertEq(v.terms.quorumBps, 6_000, "quorum");
        assertEq(v.proposer, 3, "proposer");
        assertEq(v.joined, 0, "nobody, the proposer included");
        assertEq(swarm.runCount(), 2, "two runs");
    }

    /// @dev Slots are paid for beforehand with what looks like values; the view must not show them.
    function test_run_without_rounds_shows_none() public {
        run = proposeRun(100, 50, 2, 0);
        ISwarm.RunView memory v = view_();
        assertTrue(v.phase == ISwarm.Phase.None && v.outcome == ISwarm.Outcome.Pending, "phase");
        assertEq(v.round + v.commitDeadline + v.voteDeadline + v.quorum, 0, "round");
        assertEq(v.members | v.expected | v.committed | v.voted | v.rejecting, 0, "masks");
        assertEq(v.finalizedRound + v.failures + v.rejections, 0, "counts");
        assertEq(v.checkpoint | v.manifest, 0, "results");
        assertEq(v.head, SPEC, "the chain of results begins with the spec");
        assertEq(v.commitments.length, SITES, "a word per site");
        for (uint256 i = 0; i < SITES; ++i) assertEq(v.commitments[i], 0, "commitment");
        assertEq(swarm.acceptingOf(run, C1, M1), 0, "nothing accepted");
    }

    function test_terms_at_their_bounds() public {
        run = proposeRun(uint32(WINDOW_MAX), uint32(WINDOW_MAX), 4, 10_000);
        ISwarm.RunView memory v = view_();
        assertEq(v.terms.commitWindow, WINDOW_MAX, "commit window");
        assertEq(v.terms.voteWindow, WINDOW_MAX, "vote window");
        assertEq(v.terms.sitesMin, 4, "all sites");
        assertEq(v.terms.quorumBps, 10_000, "unanimity");
        run = proposeRun(1, 1, 1, 0);
        assertEq(view_().terms.sitesMin, 1, "one site");
    }

    function test_invalid_spec() public {
        expect(ISwarm.EmptyDigest.selector, 2, 0);
        vm.prank(key(0));
        swarm.proposeRun(0, terms());
        assertEq(swarm.runCount(), 1, "not counted");
    }

    function test_invalid_windows() public {
        expect(ISwarm.WindowOutOfRange.selector, 0, WINDOW_MAX);
        proposeRun(0, 50, 2, 0);
        expect(ISwarm.WindowOutOfRange.selector, 0, WINDOW_MAX);
        proposeRun(100, 0, 2, 0);
        expect(ISwarm.WindowOutOfRange.selector, WINDOW_MAX + 1, WINDOW_MAX);
        proposeRun(uint32(WINDOW_MAX + 1), 50, 2, 0);
        expect(ISwarm.WindowOutOfRange.selector, type(uint32).max, WINDOW_MAX);
        proposeRun(100, type(uint32).max, 2, 0);
    }

    function test_invalid_sites_min() public {
        expect(ISwarm.SitesMinOutOfRange.selector, 0, 4);
        proposeRun(100, 50, 0, 0);
        expect(ISwarm.SitesMinOutOfRange.selector, 5, 4);
        proposeRun(100, 50, 5, 0);
        remove(3);
        expect(ISwarm.SitesMinOutOfRange.selector, 4, 3);
        proposeRun(100, 50, 4, 0); // a removed site is none that could join
    }

    function test_invalid_quorum() public {
        expect(ISwarm.QuorumOutOfRange.selector, 10_001, 10_000);
        proposeRun(100, 50, 2, 10_001);
    }

    function test_invalid_outsider() public {
        bytes[4] memory calls = [
            abi.encodeCall(ISwarm.proposeRun, (SPEC, terms())),
            abi.encodeCall(ISwarm.joinRun, (run)),
            abi.encodeCall(ISwarm.leaveRun, (run)),
            abi.encodeCall(ISwarm.announce, (run))
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            refuse(OUTSIDER, calls[i], abi.encodeWithSelector(ISwarm.NotSite.selector, OUTSIDER));
        }
    }

    function test_invalid_unknown_run() public {
        bytes[7] memory calls = [
            abi.encodeCall(ISwarm.joinRun, (2)),
            abi.encodeCall(ISwarm.leaveRun, (2)),
            abi.encodeCall(ISwarm.announce, (2)),
            abi.encodeCall(ISwarm.openRound, (2)),
            abi.encodeCall(ISwarm.commit, (2, 1, C1)),
            abi.encodeCall(ISwarm.vote, (2, 1, C1, M1, true, 0)),
            abi.encodeCall(ISwarm.viewRun, (2, 0))
        ];
        for (uint256 i = 0; i < calls.length; ++i) {
            refuse(key(0), calls[i], abi.encodeWithSelector(ISwarm.UnknownRun.selector, 2, 1));
        }
        expect(ISwarm.UnknownRun.selector, 0, 1);
        swarm.phaseAt(0, 0, 0);
        expect(ISwarm.UnknownRun.selector, 3, 1);
        swarm.acceptingOf(3, C1, M1);
    }

    // ------------------------------------------------------------------ join, leave, announce

    function test_joining() public {
        run = proposeRun(100, 50, 2, 0);
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RunJoined(2, 1);
        join(1);
        assertEq(view_().joined, 2, "site 1");
        expect(ISwarm.AlreadyJoined.selector, 2, 1);
        join(1);
        join(3);
        assertEq(view_().joined, 10, "and site 3");
        assertEq(swarm.viewRun(1, 0).joined, 15, "the other run is another");
    }

    function test_joining_announces() public {
        startRun(100, 50, 2, 0, 2);
        open(0);
        commit(0, 1);
        commit(1, 1);
        join(2);
        vote(0, 1, C1, true);
        vote(1, 1, C1, true);
        open(0);
        assertEq(view_().expected, 7, "who came, and who joined since");
    }

    function test_leaving_binds_from_the_next_round() public {
        open(0);
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RunLeft(1, 3);
        leave(3);
        assertEq(view_().joined, 7, "left");
        assertEq(view_().members, 15, "the snapshot stands");
        finalize(1, C1);
        open(0);
        assertEq(view_().members, 7, "three members");
        assertEq(view_().expected, 7, "and nobody waits for the fourth");
        expect(ISwarm.NotMember.selector, 2, 3);
        commit(3, 2);
        expect(ISwarm.NotJoined.selector, 1, 3);
        open(3);
    }

    function test_leaving_and_coming_back() public {
        open(0);
        commitAll(1);
        leave(3);
        join(3);
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        open(3);
        assertEq(view_().members, 15, "as if nothing had been");
    }

    function test_a_run_rests_while_too_few_are_joined() public {
        for (uint256 i = 1; i < 4; ++i) leave(i);
        expect(ISwarm.TooFewSites.selector, 1, 2);
        open(0);
        join(2);
        open(0);
        assertEq(view_().members, 5, "and goes on");
    }

    function test_announcing() public {
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.Announced(1, 2);
        announce(2);
        announce(2);
        open(0);
        commit(0, 1);
        commit(1, 1);
        pass(150);
        announce(2);
        announce(3);
        open(0);
        assertEq(view_().expected, 15, "two came, two announced themselves");
        pass(100);
        open(0);
        assertEq(view_().expected, 15, "nobody came: all are waited for");
    }

    function test_announcement_serves_one_round() public {
        open(0);
        for (uint256 i = 0; i < 3; ++i) commit(i, 1);
        pass(150);
        announce(3);
        open(0);
        assertEq(view_().expected, 15, "announced");
        for (uint256 i = 0; i < 3; ++i) commit(i, 2);
        pass(150);
        open(0);
        assertEq(view_().expected, 7, "and did not come");
    }

    function test_announcement_of_who_left_is_void() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        announce(3);
        leave(3);
        pass(150);
        open(0);
        assertEq(view_().expected, 3, "only who came");
    }

    function test_invalid_without_having_joined() public {
        run = proposeRun(100, 50, 2, 0);
        expect(ISwarm.NotJoined.selector, 2, 0);
        announce(0);
        expect(ISwarm.NotJoined.selector, 2, 0);
        leave(0);
        expect(ISwarm.NotJoined.selector, 2, 0);
        open(0);
        join(0);
        leave(0);
        expect(ISwarm.NotJoined.selector, 2, 0);
        leave(0);
    }

    // ------------------------------------------------------------------ several runs

    function test_runs_do_not_touch_each_other() public {
        uint256 other = proposeRun(100, 50, 1, 0);
        open(0);
        commitAll(1);
        bytes32 before = keccak256(abi.encode(swarm.viewRun(1, START)));
        run = other;
        join(0);
        open(0);
        commit(0, 1);
        vote(0, 1, C2, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
        assertEq(keccak256(abi.encode(swarm.viewRun(1, START))), before, "run 1 as it was");
        run = 1;
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        assertEq(view_().checkpoint, C1, "its own checkpoint");
        assertEq(swarm.viewRun(other, 0).checkpoint, C2, "and the other's");
        assertEq(swarm.acceptingOf(1, C2, M1), 0, "no vote leaks");
    }

    function testFuzz_many_runs_count_up(uint8 runs) public {
        uint256 more = uint256(runs) % 20;
        for (uint256 i = 0; i < more; ++i) assertEq(proposeRun(1, 1, 1, 0), i + 2, "next");
        assertEq(swarm.runCount(), more + 1, "count");
    }

    /// @dev All that a proposer says comes back, whatever else stands in the same word.
    function testFuzz_terms_come_back(uint32 commitWindow, uint32 voteWindow, uint16 sitesMin, uint16 quorumBps) public {
        commitWindow = uint32(commitWindow % WINDOW_MAX + 1);
        voteWindow = uint32(voteWindow % WINDOW_MAX + 1);
        sitesMin = sitesMin % 4 + 1;
        quorumBps = quorumBps % 10_001;
        vm.prank(key(3));
        run = swarm.proposeRun(SPEC, ISwarm.Terms(commitWindow, voteWindow, sitesMin, quorumBps));
        assertEq(view_().round, 0, "no round yet");
        for (uint256 i = 0; i < SITES; ++i) join(i);
        open(2);
        commitAll(1);
        for (uint256 i = 0; i < SITES; ++i) {
            if (view_().phase == ISwarm.Phase.Vote) vote(i, 1, C1, true);
        }
        open(1);
        ISwarm.RunView memory v = view_();
        assertEq(v.terms.commitWindow, commitWindow, "commit window");
        assertEq(v.terms.voteWindow, voteWindow, "vote window");
        assertEq(v.terms.sitesMin, sitesMin, "sitesMin");
        assertEq(v.terms.quorumBps, quorumBps, "quorumBps");
        assertEq(v.commitDeadline, block.timestamp + commitWindow, "commit deadline");
        assertEq(v.voteDeadline, block.timestamp + commitWindow + voteWindow, "vote deadline");
        assertEq(v.proposer, 3, "proposer");
        assertEq(v.round, 2, "round");
        assertEq(v.finalizedRound, 1, "finalized");
    }
}
