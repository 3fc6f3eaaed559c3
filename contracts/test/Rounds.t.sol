// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Base, deploySwarm, makeFounders, vm} from "./Base.t.sol";

contract RoundsTest is Base {
    function wrongPhase(ISwarm.Phase phase, ISwarm.Phase needed) internal pure returns (bytes memory) {
        return abi.encodeWithSelector(ISwarm.WrongPhase.selector, phase, needed);
    }

    function commitCall(uint256 round, bytes32 commitment) internal view returns (bytes memory) {
        return abi.encodeCall(ISwarm.commit, (run, round, commitment));
    }

    function voteCall(uint256 round, bytes32 checkpoint, bytes32 manifest, bool accept, uint256 scoreBps)
        internal
        view
        returns (bytes memory)
    {
        return abi.encodeCall(ISwarm.vote, (run, round, checkpoint, manifest, accept, scoreBps));
    }

    // ------------------------------------------------------------------ open

    function test_opening_takes_a_snapshot() public {
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RoundOpened(1, 1, 2, 15, 15, 3);
        open(2);
        ISwarm.RunView memory v = view_();
        assertEq(v.round, 1, "round");
        assertEq(v.members, 15, "members");
        assertEq(v.expected, 15, "expected");
        assertEq(v.quorum, 3, "quorum");
        assertEq(v.commitDeadline, START + 100, "commit deadline");
        assertEq(v.voteDeadline, START + 150, "vote deadline");
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
    }

    function test_invalid_open_while_a_round_runs() public {
        open(0);
        bytes memory call_ = abi.encodeCall(ISwarm.openRound, (run));
        refuse(key(1), call_, wrongPhase(ISwarm.Phase.Commit, ISwarm.Phase.Closed));
        commitAll(1);
        refuse(key(1), call_, wrongPhase(ISwarm.Phase.Vote, ISwarm.Phase.Closed));
    }

    function test_invalid_open_with_too_few_sites() public {
        startRun(100, 50, 3, 0, 2);
        expect(ISwarm.TooFewSites.selector, 2, 3);
        open(0);
        join(2);
        remove(1);
        expect(ISwarm.TooFewSites.selector, 2, 3);
        open(0);
    }

    function test_any_joined_site_opens() public {
        for (uint256 i = 0; i < SITES; ++i) {
            open(i);
            pass(100);
        }
        assertEq(view_().round, SITES, "each in turn");
    }

    function test_dead_site_costs_one_window_once() public {
        open(0);
        for (uint256 i = 0; i < 3; ++i) commit(i, 1);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending); // site 3 is waited for
        pass(100);
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RoundOpened(1, 2, 1, 15, 7, 3);
        open(1);
        for (uint256 i = 0; i < 3; ++i) commit(i, 2);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // and not again
        for (uint256 i = 0; i < 3; ++i) vote(i, 2, C1, true);
        announce(3);
        open(1);
        for (uint256 i = 0; i < 3; ++i) commit(i, 3);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending); // until it says that it is back
        commit(3, 3);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    function test_unexpected_member_may_commit() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        pass(150);
        open(0);
        assertEq(view_().expected, 3, "who came");
        commit(3, 2);
        commit(0, 2);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending); // site 1 is still expected
        commit(1, 2);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        assertEq(view_().committed, 11, "three of four");
    }

    function test_all_are_expected_where_nobody_came() public {
        open(0);
        pass(100);
        open(0);
        assertEq(view_().expected, 15, "nobody is known, all are waited for");
        commit(1, 2);
        commit(2, 2);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
    }

    function test_fewer_expected_than_needed() public {
        open(0);
        commit(3, 1);
        pass(100);
        open(0);
        assertEq(view_().expected, 8, "site 3 alone");
        commit(3, 2);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending); // all expected are there, but two are needed
        commit(0, 2);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    // ------------------------------------------------------------------ commit

    function test_commitments_are_recorded() public {
        open(0);
        for (uint256 i = 0; i < SITES; ++i) {
            vm.expectEmit(true, true, true, true, address(swarm));
            emit ISwarm.Committed(1, 1, i, commitmentOf(i, 1));
            commit(i, 1);
            assertEq(view_().committed, (2 << i) - 1, "mask");
        }
    }

    function test_commitments_of_the_newest_round_only() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        pass(150);
        open(0);
        commit(2, 2);
        ISwarm.RunView memory v = view_();
        assertEq(v.committed, 4, "of this round");
        assertEq(v.commitments[0], 0, "not the older one's");
        assertEq(v.commitments[2], commitmentOf(2, 2), "this one's");
    }

    function test_commit_phase_ends_with_the_last_expected_site() public {
        open(0);
        pass(60);
        commitAll(1);
        ISwarm.RunView memory v = view_();
        assertEq(v.commitDeadline, START + 60, "early");
        assertEq(v.voteDeadline, START + 110, "and the vote counts from there");
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    function test_commit_in_the_last_second() public {
        open(0);
        pass(99);
        commit(0, 1);
        commit(1, 1);
        pass(1);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        refuse(key(2), commitCall(1, C1), wrongPhase(ISwarm.Phase.Vote, ISwarm.Phase.Commit));
    }

    function test_round_expires_with_too_few_commitments() public {
        open(0);
        commit(0, 1);
        pass(99);
        assertPhase(ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
        pass(1);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
        refuse(key(0), voteCall(1, C1, M1, true, 0), wrongPhase(ISwarm.Phase.Closed, ISwarm.Phase.Vote));
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RoundExpired(1, 1);
        open(3);
        assertEq(view_().failures, 1, "failures");
        assertEq(view_().expected, 1, "only site 0 came last time");
    }

    function test_exactly_enough_is_enough() public {
        open(0);
        commit(2, 1);
        commit(3, 1);
        pass(100);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
    }

    function test_invalid_second_commit() public {
        open(0);
        commit(0, 1);
        refuse(key(0), commitCall(1, C2), abi.encodeWithSelector(ISwarm.AlreadyCommitted.selector, 1, 0));
        assertEq(view_().commitments[0], commitmentOf(0, 1), "the first one stands");
    }

    function test_invalid_empty_commitment() public {
        open(0);
        refuse(key(0), commitCall(1, 0), abi.encodeWithSelector(ISwarm.EmptyDigest.selector, 1, 1));
    }

    function test_invalid_commit_by_who_joined_later() public {
        startRun(100, 50, 2, 0, 2);
        open(0);
        join(2);
        refuse(key(2), commitCall(1, C1), abi.encodeWithSelector(ISwarm.NotMember.selector, 1, 2));
        commit(0, 1);
        refuse(key(2), commitCall(1, C1), abi.encodeWithSelector(ISwarm.NotMember.selector, 1, 2));
        refuse(key(3), commitCall(1, C1), abi.encodeWithSelector(ISwarm.NotMember.selector, 1, 3));
    }

    function test_invalid_commit_in_another_round() public {
        refuse(key(0), commitCall(0, C1), abi.encodeWithSelector(ISwarm.WrongRound.selector, 0, 0));
        refuse(key(0), commitCall(1, C1), abi.encodeWithSelector(ISwarm.WrongRound.selector, 1, 0));
        open(0);
        refuse(key(0), commitCall(2, C1), abi.encodeWithSelector(ISwarm.WrongRound.selector, 2, 1));
        refuse(key(0), commitCall(0, C1), abi.encodeWithSelector(ISwarm.WrongRound.selector, 0, 1));
    }

    // ------------------------------------------------------------------ vote

    function test_round_finalizes_with_a_majority() public {
        open(0);
        commitAll(1);
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.Voted(1, 1, 0, C1, M1, true, 9_000);
        vote(0, 1, C1, true);
        vote(1, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // 2 of 4 are no majority
        bytes32 head = keccak256(abi.encode(SPEC, uint256(1), C1, M1));
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RoundFinalized(1, 1, C1, M1, head);
        vote(2, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
        ISwarm.RunView memory v = view_();
        assertEq(v.checkpoint, C1, "checkpoint");
        assertEq(v.manifest, M1, "manifest");
        assertEq(v.head, head, "head");
        assertEq(v.finalizedRound, 1, "finalized round");
        assertEq(v.voted, 7, "who voted");
        assertEq(v.rejecting, 0, "nobody rejects");
        assertEq(swarm.acceptingOf(run, C1, M1), 7, "accepting");
    }

    function test_head_chains_the_finalized_rounds() public {
        open(0);
        finalize(1, C1);
        bytes32 head = view_().head;
        open(0);
        pass(100);
        assertEq(view_().head, head, "an expired round adds nothing");
        open(0);
        finalize(3, C2);
        assertEq(view_().head, keccak256(abi.encode(head, uint256(3), C2, M1)), "head");
        assertEq(view_().finalizedRound, 3, "newest");
    }

    function test_quorum_above_the_majority() public {
        startRun(100, 50, 2, 10_000, SITES);
        open(0);
        assertEq(view_().quorum, 4, "unanimous");
        commitAll(1);
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        vote(3, 1, C1, false);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Rejected); // one rejection makes it impossible
    }

    function test_quorum_is_rounded_up() public {
        found(3);
        startRun(100, 50, 2, 6_667, 3);
        open(0);
        assertEq(view_().quorum, 3, "two of three are not quite enough");
        startRun(100, 50, 2, 6_666, 3);
        open(0);
        assertEq(view_().quorum, 2, "two of three are enough");
    }

    function test_round_is_rejected_when_no_quorum_is_left() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, false);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        assertEq(view_().rejecting, 1, "site 0");
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.RoundRejected(1, 1, 3);
        vote(1, 1, C2, false);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Rejected);
        ISwarm.RunView memory v = view_();
        assertEq(v.rejecting, 3, "both, whatever they computed");
        assertEq(v.checkpoint, 0, "the parent stays");
        open(1);
        assertEq(view_().rejections, 1, "rejections");
        assertEq(view_().failures, 1, "failures");
        assertEq(view_().rejecting | view_().voted, 0, "a new round, new votes");
    }

    /// @dev A round is said to have expired when it has, and not when it was rejected or finalized.
    function test_opening_says_expired_of_expired_rounds_only() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, false);
        vote(1, 1, C1, false);
        assertEq(countLogsOfOpening(), 1, "after a rejected round");
        finalize(2, C1);
        assertEq(countLogsOfOpening(), 1, "after a finalized round");
        pass(100);
        assertEq(countLogsOfOpening(), 2, "after an expired round");
    }

    function countLogsOfOpening() internal returns (uint256) {
        vm.recordLogs();
        open(0);
        return vm.getRecordedLogs().length;
    }

    function test_failures_and_rejections_count_until_a_round_is_finalized() public {
        open(0);
        for (uint256 n = 1; n <= 4; ++n) {
            if (n % 2 == 1) {
                commitAll(n);
                vote(0, n, C1, false);
                vote(1, n, C1, false);
            } else {
                pass(100);
            }
            open(0);
            assertEq(view_().failures, n, "failures");
            assertEq(view_().rejections, (n + 1) / 2, "rejections");
        }
        finalize(5, C1);
        open(0);
        assertEq(view_().failures + view_().rejections, 0, "forgotten");
    }

    function test_counts_stop_at_255() public {
        open(0);
        for (uint256 n = 1; n <= 260; ++n) {
            commitAll(n);
            vote(0, n, C1, false);
            vote(1, n, C1, false);
            open(0);
        }
        assertEq(view_().failures, 255, "failures");
        assertEq(view_().rejections, 255, "rejections");
        assertEq(view_().round, 261, "and the round goes on");
    }

    function test_split_votes_decide_nothing() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, true);
        vote(1, 1, C1, true);
        vote(2, 1, C2, true);
        vote(3, 1, C2, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // they may still move
        assertEq(swarm.acceptingOf(run, C1, M1), 3, "half");
        assertEq(swarm.acceptingOf(run, C2, M1), 12, "and half");
        assertEq(view_().voted, 15, "all have voted");
        pass(50);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
    }

    /// @dev The first ballot is not favoured: a majority behind a later one finalizes that.
    function test_majority_behind_a_later_ballot() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, true);
        for (uint256 i = 1; i < 4; ++i) vote(i, 1, C2, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
        assertEq(view_().checkpoint, C2, "what three of four accept");
        assertEq(swarm.acceptingOf(run, C2, M1), 14, "three");
        assertEq(swarm.acceptingOf(run, C1, M1), 1, "one");
    }

    function test_ballots_differ_by_manifest_too() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, true);
        for (uint256 i = 1; i < 3; ++i) {
            vm.prank(key(i));
            swarm.vote(run, 1, C1, M2, true, 1);
        }
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        assertEq(swarm.acceptingOf(run, C1, M1), 1, "one certificate");
        assertEq(swarm.acceptingOf(run, C1, M2), 6, "another");
    }

    function test_vote_moves() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, true);
        vote(0, 1, C2, true);
        assertEq(swarm.acceptingOf(run, C1, M1), 0, "away from the first");
        assertEq(swarm.acceptingOf(run, C2, M1), 1, "to the second");
        vote(0, 1, C2, false);
        assertEq(swarm.acceptingOf(run, C2, M1), 0, "away from the second");
        assertEq(view_().rejecting, 1, "to a rejection");
        vote(0, 1, C1, true);
        assertEq(swarm.acceptingOf(run, C1, M1), 1, "and back");
        assertEq(view_().rejecting, 0, "no longer rejecting");
        assertEq(view_().voted, 1, "one site, one vote");
        vote(0, 1, C1, true);
        assertEq(swarm.acceptingOf(run, C1, M1), 1, "repeated, it stays one");
    }

    function test_rejection_withdrawn_in_time_rejects_nothing() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, false);
        vote(0, 1, C1, true);
        vote(1, 1, C1, false);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        vote(2, 1, C1, true);
        vote(3, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
        assertEq(view_().rejecting, 2, "site 1 alone");
    }

    /// @dev Slots that an earlier round filled must not be taken for this one's.
    function test_votes_of_the_last_round_are_forgotten() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, true);
        vote(1, 1, C2, true);
        vote(2, 1, C1, false);
        pass(50);
        open(0);
        commitAll(2);
        assertEq(view_().voted | view_().rejecting, 0, "nobody has voted");
        assertEq(swarm.acceptingOf(run, C1, M1), 0, "nor for the same result");
        assertEq(swarm.acceptingOf(run, C2, M1), 0, "nor for the other");
        vote(3, 2, C2, false);
        assertEq(view_().rejecting, 8, "site 3 alone");
        vote(2, 2, C1, true);
        vote(1, 2, C1, true);
        assertEq(view_().voted, 14, "three");
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        vote(0, 2, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
    }

    function test_late_first_vote_is_recorded_and_changes_nothing() public {
        open(0);
        finalize(1, C1);
        bytes32 head = view_().head;
        pass(49);
        vote(3, 1, C2, false);
        assertEq(view_().voted, 15, "recorded");
        assertEq(view_().rejecting, 8, "as what it is");
        assertEq(view_().head, head, "nothing moved");
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
    }

    function test_late_vote_reopens_no_rejection() public {
        open(0);
        commitAll(1);
        vote(0, 1, C1, false);
        vote(1, 1, C1, false);
        vote(2, 1, C1, true);
        vote(3, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Rejected);
        assertEq(view_().finalizedRound, 0, "none");
        assertEq(swarm.acceptingOf(run, C1, M1), 12, "recorded");
    }

    function test_invalid_late_vote() public {
        open(0);
        finalize(1, C1);
        bytes memory reason = wrongPhase(ISwarm.Phase.Closed, ISwarm.Phase.Vote);
        refuse(key(0), voteCall(1, C2, M1, true, 0), reason); // decided: what is cast stays
        refuse(key(0), voteCall(1, C1, M1, false, 0), reason);
        pass(50);
        refuse(key(3), voteCall(1, C1, M1, true, 0), reason);
        assertEq(swarm.acceptingOf(run, C1, M1), 7, "a finalized result keeps its majority");
    }

    function test_invalid_vote_outside_its_phase() public {
        open(0);
        refuse(key(0), voteCall(1, C1, M1, true, 0), wrongPhase(ISwarm.Phase.Commit, ISwarm.Phase.Vote));
        commitAll(1);
        pass(50);
        refuse(key(0), voteCall(1, C1, M1, true, 0), wrongPhase(ISwarm.Phase.Closed, ISwarm.Phase.Vote));
    }

    function test_vote_in_the_last_second() public {
        open(0);
        commitAll(1);
        pass(49);
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
    }

    function test_invalid_vote_without_digests() public {
        open(0);
        commitAll(1);
        bytes memory reason = abi.encodeWithSelector(ISwarm.EmptyDigest.selector, 1, 1);
        refuse(key(0), voteCall(1, 0, M1, true, 0), reason);
        refuse(key(0), voteCall(1, C1, 0, true, 0), reason);
        refuse(key(0), voteCall(1, 0, 0, false, 0), reason);
    }

    function test_invalid_score() public {
        open(0);
        commitAll(1);
        refuse(
            key(0),
            voteCall(1, C1, M1, true, 10_001),
            abi.encodeWithSelector(ISwarm.ScoreOutOfRange.selector, 10_001, 10_000)
        );
        vm.prank(key(0));
        swarm.vote(run, 1, C1, M1, true, 10_000);
    }

    function test_invalid_vote_by_who_is_no_member() public {
        startRun(100, 50, 2, 0, 2);
        open(0);
        join(2);
        commit(0, 1);
        commit(1, 1);
        bytes memory reason = abi.encodeWithSelector(ISwarm.NotMember.selector, 1, 2);
        refuse(key(2), voteCall(1, C1, M1, true, 0), reason);
        vote(0, 1, C1, true);
        refuse(key(2), voteCall(1, C1, M1, true, 0), reason);
        refuse(key(2), voteCall(1, C2, M1, false, 0), reason);
    }

    function test_member_that_did_not_commit_may_vote() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        pass(100);
        vote(2, 1, C1, true);
        vote(3, 1, C1, true);
        vote(0, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
    }

    // ------------------------------------------------------------------ views

    function test_phase_of_any_round() public {
        open(0);
        finalize(1, C1);
        open(0);
        commitAll(2);
        vote(0, 2, C1, false);
        vote(1, 2, C1, false);
        open(0);
        pass(100);
        open(0);
        ISwarm.Outcome[3] memory outcomes =
            [ISwarm.Outcome.Finalized, ISwarm.Outcome.Rejected, ISwarm.Outcome.Expired];
        for (uint256 n = 1; n <= 3; ++n) {
            (ISwarm.Phase phase, ISwarm.Outcome outcome) = swarm.phaseAt(run, n, n == 2 ? 0 : block.timestamp);
            assertTrue(phase == ISwarm.Phase.Closed && outcome == outcomes[n - 1], "past");
        }
        (ISwarm.Phase now_,) = swarm.phaseAt(run, 4, block.timestamp);
        assertTrue(now_ == ISwarm.Phase.Commit, "the newest");
        (now_,) = swarm.phaseAt(run, 5, block.timestamp);
        assertTrue(now_ == ISwarm.Phase.None, "no such round yet");
        (now_,) = swarm.phaseAt(run, 0, block.timestamp);
        assertTrue(now_ == ISwarm.Phase.None, "nor ever");
    }

    function test_phase_at_another_time() public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        (ISwarm.Phase phase,) = swarm.phaseAt(run, 1, START + 99);
        assertTrue(phase == ISwarm.Phase.Commit, "commit");
        (phase,) = swarm.phaseAt(run, 1, START + 100);
        assertTrue(phase == ISwarm.Phase.Vote, "vote");
        (phase,) = swarm.phaseAt(run, 1, START + 149);
        assertTrue(phase == ISwarm.Phase.Vote, "vote");
        ISwarm.Outcome outcome;
        (phase, outcome) = swarm.phaseAt(run, 1, START + 150);
        assertTrue(phase == ISwarm.Phase.Closed && outcome == ISwarm.Outcome.Expired, "expired");
        assertTrue(swarm.viewRun(run, START + 120).phase == ISwarm.Phase.Vote, "the view, too");
        assertTrue(swarm.viewRun(run, 0).phase == ISwarm.Phase.Commit, "0 is now");
    }

    function test_accepting_speaks_of_the_newest_round() public {
        open(0);
        finalize(1, C1);
        assertEq(swarm.acceptingOf(run, C1, M1), 7, "now");
        open(0);
        assertEq(swarm.acceptingOf(run, C1, M1), 0, "no longer");
    }

    function test_two_hundred_and_fifty_six_members() public {
        found(256);
        open(255);
        for (uint256 i = 0; i < 256; ++i) commit(i, 1);
        assertEq(view_().committed, type(uint256).max, "all");
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        assertEq(view_().quorum, 129, "quorum");
        for (uint256 i = 0; i < 128; ++i) vote(255 - i, 1, C1, true);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending); // 128 are no majority
        vote(0, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
        for (uint256 i = 1; i < 128; ++i) vote(i, 1, C1, true);
        assertEq(view_().voted, type(uint256).max, "all have voted");
        open(17);
        commit(3, 2);
        assertEq(view_().committed, 8, "one of the next round");
        assertEq(view_().expected, type(uint256).max, "all are expected");
    }

    function test_two_hundred_and_fifty_six_rejecting() public {
        found(256);
        open(0);
        for (uint256 i = 0; i < 256; ++i) commit(i, 1);
        for (uint256 i = 0; i < 127; ++i) vote(i, 1, C1, false);
        assertPhase(ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        vote(127, 1, C1, false);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Rejected); // 128 are left, 129 are needed
    }

    /// @dev Outcomes are packed, 128 to a word: none may leak into another round's.
    function test_outcomes_of_three_hundred_rounds_stay_what_they_were() public {
        for (uint256 n = 1; n <= 300; ++n) {
            open(0);
            commitAll(n);
            if (n % 3 == 0) {
                pass(50); // expired: nobody voted
                continue;
            }
            for (uint256 i = 0; i < 3; ++i) vote(i, n, C1, n % 3 == 1); // finalized or rejected
        }
        for (uint256 n = 1; n <= 300; ++n) {
            (, ISwarm.Outcome outcome) = swarm.phaseAt(run, n, block.timestamp);
            ISwarm.Outcome[3] memory outcomes =
                [ISwarm.Outcome.Expired, ISwarm.Outcome.Finalized, ISwarm.Outcome.Rejected];
            assertTrue(outcome == outcomes[n % 3], "outcome");
        }
    }

    // ------------------------------------------------------------------ fuzz

    function testFuzz_phases_follow_time(uint32 t) public {
        open(0);
        commit(0, 1);
        commit(1, 1);
        uint256 at = START + uint256(t) % 400;
        ISwarm.Phase expected = at < START + 100
            ? ISwarm.Phase.Commit
            : at < START + 150 ? ISwarm.Phase.Vote : ISwarm.Phase.Closed;
        assertTrue(swarm.viewRun(run, at).phase == expected, "phase");
    }

    /// @dev Any sites commit, any vote anything: the outcome is what counting by hand gives.
    function testFuzz_outcome_is_the_count(uint8 coming, uint256 choices, uint16 quorumBps) public {
        found(7);
        startRun(100, 50, 2, quorumBps % 10_001, 7);
        open(0);
        uint256 quorum = view_().quorum;
        for (uint256 i = 0; i < 7; ++i) {
            if (coming >> i & 1 == 1) commit(i, 1);
        }
        pass(100);
        if (view_().phase != ISwarm.Phase.Vote) return;
        uint256[3] memory counts; // for C1, for C2, against
        uint256 winner = 3;
        for (uint256 i = 0; i < 7 && winner == 3; ++i) {
            uint256 choice = (choices >> (8 * i)) % 4;
            if (choice == 3) continue;
            vote(i, 1, choice == 1 ? C2 : C1, choice != 2);
            ++counts[choice];
            if (choice != 2 && counts[choice] >= quorum) winner = choice;
            if (choice == 2 && counts[2] + quorum > 7) winner = 2;
        }
        ISwarm.RunView memory v = view_();
        if (winner == 3) assertTrue(v.phase == ISwarm.Phase.Vote, "undecided");
        else if (winner == 2) assertTrue(v.outcome == ISwarm.Outcome.Rejected, "rejected");
        else assertEq(v.checkpoint, winner == 0 ? C1 : C2, "the winner");
    }
}
