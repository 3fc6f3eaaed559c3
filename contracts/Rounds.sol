// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Bits} from "./Bits.sol";
import {Clock, Phases} from "./Phases.sol";
import {Runs} from "./Runs.sol";

/// @notice How it is trained: open, commit, vote; phases computed, outcomes latched.
abstract contract Rounds is Runs {
    using Bits for uint256;
    using Phases for Clock;

    bytes32 private constant COMMITMENT_TYPE = keccak256("swarmchain.commitment.v1");

    // ------------------------------------------------------------------ open

    function openRound(uint256 run) external returns (uint256 round) {
        (Run storage r, uint256 site) = _joinedRun(run);
        Clock memory c = r.clock;
        (Phase phase, Outcome outcome) = c.phase(r.terms.voteWindow, block.timestamp);
        if (phase == Phase.Commit || phase == Phase.Vote) revert WrongPhase(phase, Phase.Closed);
        uint256 members = r.joined;
        if (members.count() < r.terms.sitesMin) revert TooFewSites(members.count(), r.terms.sitesMin);

        uint256 expected = (c.anyCommit ? r.committed : 0) | r.announced;
        if (phase == Phase.Closed) _settle(r, c, run, outcome);
        round = _start(r, c, members.count());
        r.members = members;
        r.expected = expected;
        r.announced = 0;
        emit RoundOpened(run, round, site, members, expected, c.quorum);
    }

    /// @dev Writes the newest round's outcome down before its slots are reused.
    function _settle(Run storage r, Clock memory c, uint256 run, Outcome outcome) private {
        r.outcomes[c.round >> 7] |= uint256(outcome) << ((c.round & 127) << 1);
        if (outcome == Outcome.Finalized) {
            (c.failures, c.rejections) = (0, 0);
            return;
        }
        if (c.failures < type(uint16).max) ++c.failures;
        if (outcome == Outcome.Rejected && c.rejections < type(uint8).max) ++c.rejections;
        if (outcome == Outcome.Expired) emit RoundExpired(run, c.round);
    }

    function _start(Run storage r, Clock memory c, uint256 members) private returns (uint256 round) {
        round = ++c.round;
        c.openedAt = uint40(block.timestamp);
        c.commitDeadline = uint40(block.timestamp + r.terms.commitWindow);
        c.votingFrom = 0;
        c.quorum = uint16(Phases.quorum(members, r.terms.quorumBps));
        c.outcome = Outcome.Pending;
        (c.enough, c.anyCommit, c.anyVote) = (false, false, false);
        r.clock = c;
    }

    // ------------------------------------------------------------------ commit

    function commit(uint256 run, uint256 round, bytes32 commitment) external {
        (Run storage r, Clock memory c, uint256 site) = _member(run, round);
        (Phase phase,) = c.phase(r.terms.voteWindow, block.timestamp);
        if (phase != Phase.Commit) revert WrongPhase(phase, Phase.Commit);
        if (commitment == 0) revert EmptyDigest(run, round);
        uint256 committed = c.anyCommit ? r.committed : 0;
        if (committed.has(site)) revert AlreadyCommitted(round, site);

        committed |= Bits.bit(site);
        r.committed = committed;
        r.commitments[site] = commitment;
        _countCommitments(r, c, committed);
        emit Committed(run, round, site, commitment);
    }

    /// @dev The clock is written only when something in it changes: at the first commitment of a round, when there are
    /// enough, and when every expected site has come.
    function _countCommitments(Run storage r, Clock memory c, uint256 committed) private {
        bool enough = committed.count() >= r.terms.sitesMin;
        bool complete = enough && (committed & r.expected) == r.expected;
        if (c.anyCommit && c.enough == enough && !complete) return;
        c.anyCommit = true;
        c.enough = enough;
        if (complete) c.votingFrom = uint40(block.timestamp);
        r.clock = c;
    }

    // ------------------------------------------------------------------ vote

    function vote(
        uint256 run, uint256 round, bytes32 checkpoint, bytes32 manifest, bool accept, uint256 scoreBps
    ) external {
        (Run storage r, Clock memory c, uint256 site) = _member(run, round);
        _requireVoting(r, c);
        if (checkpoint == 0 || manifest == 0) revert EmptyDigest(run, round);
        if (scoreBps > BPS) revert ScoreOutOfRange(scoreBps, BPS);

        bytes32 ballot = _ballot(round, checkpoint, manifest);
        uint256 rejecting = _record(r, c, site, ballot, accept);
        emit Voted(run, round, site, checkpoint, manifest, accept, scoreBps);
        if (c.outcome != Outcome.Pending) return;
        if (r.accepting[ballot].count() >= c.quorum) {
            _finalize(r, c, run, checkpoint, manifest);
        } else if (rejecting.count() > r.members.count() - c.quorum) {
            c.outcome = Outcome.Rejected;
            r.clock = c;
            emit RoundRejected(run, round, rejecting);
        }
    }

    function _requireVoting(Run storage r, Clock memory c) private view {
        uint256 voteWindow = r.terms.voteWindow;
        (Phase phase,) = c.phase(voteWindow, block.timestamp);
        if (phase == Phase.Vote) return;
        bool late = c.outcome != Outcome.Pending && block.timestamp < c.voteDeadline(voteWindow);
        if (!late) revert WrongPhase(phase, Phase.Vote);
    }

    /// @dev Moves the site's vote from wherever it stood in this round. Returns the mask of the rejecting members.
    function _record(Run storage r, Clock memory c, uint256 site, bytes32 ballot, bool accept)
        private
        returns (uint256 rejecting)
    {
        uint256 own = Bits.bit(site);
        uint256 voted = c.anyVote ? r.voted : 0;
        rejecting = c.anyVote ? r.rejecting : 0;
        if (voted & own != 0 && rejecting & own == 0) r.accepting[r.ballots[site]] &= ~own;
        rejecting = accept ? rejecting & ~own : rejecting | own;
        if (accept) r.accepting[ballot] |= own;
        r.ballots[site] = ballot;
        r.voted = voted | own;
        r.rejecting = rejecting;
        if (!c.anyVote) {
            c.anyVote = true;
            r.clock = c;
        }
    }

    function _finalize(Run storage r, Clock memory c, uint256 run, bytes32 checkpoint, bytes32 manifest) private {
        c.outcome = Outcome.Finalized;
        c.finalizedRound = c.round;
        r.clock = c;
        r.checkpoint = checkpoint;
        r.manifest = manifest;
        bytes32 head = keccak256(abi.encode(r.head, uint256(c.round), checkpoint, manifest));
        r.head = head;
        emit RoundFinalized(run, c.round, checkpoint, manifest, head);
    }

    function _member(uint256 run, uint256 round) private view returns (Run storage r, Clock memory c, uint256 site) {
        (r, site) = _joinedRun(run);
        c = r.clock;
        if (round == 0 || round != c.round) revert WrongRound(round, c.round);
        if (!r.members.has(site)) revert NotMember(round, site);
    }

    function _ballot(uint256 round, bytes32 checkpoint, bytes32 manifest) private pure returns (bytes32) {
        return keccak256(abi.encode(round, checkpoint, manifest));
    }

    // ------------------------------------------------------------------ views

    function phaseAt(uint256 run, uint256 round, uint256 timestamp) external view returns (Phase, Outcome) {
        Run storage r = _run(run);
        uint256 current = r.clock.round;
        if (round == current) return r.clock.phase(r.terms.voteWindow, timestamp);
        if (round > current) return (Phase.None, Outcome.Pending);
        if (round == 0) return (Phase.None, Outcome.Pending);
        return (Phase.Closed, Outcome((r.outcomes[round >> 7] >> ((round & 127) << 1)) & 3));
    }

    function acceptingOf(uint256 run, uint256 round, bytes32 checkpoint, bytes32 manifest)
        external
        view
        returns (uint256)
    {
        return _run(run).accepting[_ballot(round, checkpoint, manifest)];
    }

    function viewRun(uint256 run, uint256 timestamp) external view returns (RunView memory v) {
        Run storage r = _run(run);
        Clock memory c = r.clock;
        (v.spec, v.terms, v.proposer, v.joined) = (r.spec, r.terms, r.proposer, r.joined);
        v.round = c.round;
        (v.phase, v.outcome) = c.phase(v.terms.voteWindow, timestamp == 0 ? block.timestamp : timestamp);
        v.openedAt = c.openedAt;
        if (c.round != 0) {
            v.commitDeadline = c.commitEnd();
            v.voteDeadline = c.voteDeadline(v.terms.voteWindow);
        }
        (v.quorum, v.members, v.expected) = (c.quorum, r.members, r.expected);
        v.committed = c.anyCommit ? r.committed : 0;
        if (c.anyVote) (v.voted, v.rejecting) = (r.voted, r.rejecting);
        (v.finalizedRound, v.checkpoint, v.manifest, v.head) = (c.finalizedRound, r.checkpoint, r.manifest, r.head);
        (v.failures, v.rejections) = (c.failures, c.rejections);
        v.commitments = new bytes32[](siteCount());
        for (uint256 i = 0; i < v.commitments.length; ++i) {
            if (v.committed.has(i)) v.commitments[i] = r.commitments[i];
        }
    }

    function computeCommitment(
        uint256 run, uint256 round, address key, bytes32 digest, uint256 samples, bytes32 salt
    ) external view returns (bytes32) {
        return keccak256(
            abi.encode(COMMITMENT_TYPE, block.chainid, address(this), run, round, key, digest, samples, salt)
        );
    }
}
