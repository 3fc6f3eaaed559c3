// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Bits} from "./Bits.sol";
import "./Phases.sol";
import {Runs} from "./Runs.sol";

/// @notice How it is trained: open, commit, vote; phases computed, outcomes latched.
abstract contract Rounds is Runs {
    using Bits for uint256;

    bytes32 private constant COMMITMENT_TYPE = keccak256("swarmchain.commitment.v2");

    // ------------------------------------------------------------------ open

    function openRound(uint256 run) external returns (uint256 round) {
        (Run storage r, State s, uint256 site) = _joinedRun(run);
        (Phase phase, Outcome outcome) = s.phase(block.timestamp);
        if (phase == Phase.Commit || phase == Phase.Vote) revert WrongPhase(phase, Phase.Closed);
        uint256 active = activeSites;
        if (active == 0) revert Retired(successor);
        uint256 members = r.joined & active;
        if (members.count() < s.get(SITES_MIN)) revert TooFewSites(members.count(), s.get(SITES_MIN));

        uint256 expected = _expect(r, s, members);
        if (phase == Phase.Closed) s = _settle(r, s, run, outcome);
        uint256 quorum = Phases.quorumOf(members.count(), s.get(QUORUM_BPS));
        round = s.get(ROUND) + 1;
        s = s.set(ROUND, round).set(COMMIT_END, block.timestamp + s.get(COMMIT_WINDOW));
        s = s.set(MEMBERS, members.count()).set(QUORUM, quorum).set(FLAGS, expected == members ? 0 : PARTIAL);
        (r.state, r.members) = (s, members);
        if (expected != members) r.expected = expected;
        emit RoundOpened(run, round, site, members, expected, quorum);
    }

    /// @dev Who is known to be there. Where nobody is, all are waited for.
    function _expect(Run storage r, State s, uint256 members) private view returns (uint256 expected) {
        if (s.has(COMMITTED)) expected = r.committed & r.members;
        if (s.has(ANNOUNCED)) expected |= r.announced;
        expected &= members;
        if (expected == 0) expected = members;
    }

    /// @dev Writes the newest round's outcome down before its slots are reused.
    function _settle(Run storage r, State s, uint256 run, Outcome outcome) private returns (State) {
        r.outcomes[s.get(ROUND) >> 7] |= uint256(outcome) << ((s.get(ROUND) & 127) << 1);
        if (outcome == Outcome.Finalized) return s.set(FAILURES, 0).set(REJECTIONS, 0);
        if (outcome == Outcome.Expired) emit RoundExpired(run, s.get(ROUND));
        if (outcome == Outcome.Rejected && s.get(REJECTIONS) < 255) s = s.set(REJECTIONS, s.get(REJECTIONS) + 1);
        return s.get(FAILURES) < 255 ? s.set(FAILURES, s.get(FAILURES) + 1) : s;
    }

    // ------------------------------------------------------------------ commit

    function commit(uint256 run, uint256 round, bytes32 commitment) external {
        (Run storage r, State s, uint256 site) = _newest(run, round);
        (Phase phase,) = s.phase(block.timestamp);
        if (phase != Phase.Commit) revert WrongPhase(phase, Phase.Commit);
        if (commitment == 0) revert EmptyDigest(run, round);
        uint256 committed = s.has(COMMITTED) ? r.committed : ~r.members;
        if (committed.has(site)) {
            if (!r.members.has(site)) revert NotMember(round, site);
            revert AlreadyCommitted(round, site);
        }

        committed |= Bits.bit(site);
        (r.committed, r.commitments[site]) = (committed, commitment);
        _countCommitments(r, s, committed);
        emit Committed(run, round, site, commitment);
    }

    /// @dev The state is written only when something in it changes: at the first commitment of a round, when there are
    /// enough, and when the last expected site has come.
    function _countCommitments(Run storage r, State s, uint256 committed) private {
        State t = s.with(COMMITTED);
        if (!s.has(ENOUGH) && committed.count() + s.get(MEMBERS) >= 256 + s.get(SITES_MIN)) t = t.with(ENOUGH);
        uint256 missing = ~committed;
        if (missing != 0 && s.has(PARTIAL)) missing &= r.expected;
        if (missing == 0 && t.has(ENOUGH)) t = t.set(COMMIT_END, block.timestamp);
        if (State.unwrap(t) != State.unwrap(s)) r.state = t;
    }

    // ------------------------------------------------------------------ vote

    function vote(
        uint256 run, uint256 round, bytes32 checkpoint, bytes32 manifest, bool accept, uint256 scoreBps
    ) external {
        (Run storage r, State s, uint256 site) = _newest(run, round);
        _requireVoting(s, _hasVoted(r, s, round, site));
        if (checkpoint == 0 || manifest == 0) revert EmptyDigest(run, round);
        if (scoreBps > BPS) revert ScoreOutOfRange(scoreBps, BPS);

        (State t, uint256 votes) = accept
            ? _accept(r, s, site, _ballot(round, checkpoint, manifest))
            : _stray(r, s, site, _rejection(round));
        emit Voted(run, round, site, checkpoint, manifest, accept, scoreBps);
        if (s.outcome() == Outcome.Pending) {
            if (accept && votes >= s.get(QUORUM)) t = _finalize(r, t, run, checkpoint, manifest);
            if (!accept && votes > s.get(MEMBERS) - s.get(QUORUM)) {
                t = t.with(uint256(Outcome.Rejected));
                emit RoundRejected(run, round, r.cast[_rejection(round)]);
            }
        }
        if (State.unwrap(t) != State.unwrap(s)) r.state = t;
    }

    function _hasVoted(Run storage r, State s, uint256 round, uint256 site) private view returns (bool) {
        uint256 accepting = s.has(VOTED) ? r.accepting : ~r.members;
        if (!accepting.has(site)) return s.has(ASTRAY) && r.astray.has(site);
        if (!r.members.has(site)) revert NotMember(round, site);
        return true;
    }

    function _requireVoting(State s, bool hasVoted) private view {
        (Phase phase,) = s.phase(block.timestamp);
        if (phase == Phase.Vote) return;
        bool late = !hasVoted && s.outcome() != Outcome.Pending && block.timestamp < s.voteDeadline();
        if (!late) revert WrongPhase(phase, Phase.Vote);
    }

    /// @dev The site's vote goes to `ballot`, from wherever it lay. Returns how many votes lie there now.
    function _accept(Run storage r, State s, uint256 site, bytes32 ballot) private returns (State, uint256) {
        if (!s.has(VOTED)) (r.front, r.accepting) = (ballot, ~r.members);
        else if (r.front != ballot) return _stray(r, s, site, ballot);
        if (s.has(ASTRAY) && r.astray.has(site)) {
            r.cast[r.ballots[site]] &= ~Bits.bit(site);
            r.astray &= ~Bits.bit(site);
        }
        uint256 accepting = r.accepting | Bits.bit(site);
        r.accepting = accepting;
        return (s.with(VOTED), accepting.count() + s.get(MEMBERS) - 256);
    }

    /// @dev The same for any ballot but the front-runner, a rejection included.
    function _stray(Run storage r, State s, uint256 site, bytes32 ballot) private returns (State, uint256) {
        uint256 own = Bits.bit(site);
        uint256 astray = s.has(ASTRAY) ? r.astray : 0;
        if (astray & own != 0) r.cast[r.ballots[site]] &= ~own;
        if (s.has(VOTED)) r.accepting &= ~own;
        uint256 cast = r.cast[ballot] | own;
        (r.astray, r.ballots[site], r.cast[ballot]) = (astray | own, ballot, cast);
        return (s.with(ASTRAY), cast.count());
    }

    function _finalize(Run storage r, State s, uint256 run, bytes32 checkpoint, bytes32 manifest) private returns (State) {
        bytes32 head = keccak256(abi.encode(r.head, s.get(ROUND), checkpoint, manifest));
        (r.checkpoint, r.manifest, r.head) = (checkpoint, manifest, head);
        emit RoundFinalized(run, s.get(ROUND), checkpoint, manifest, head);
        return s.with(uint256(Outcome.Finalized)).set(FINALIZED_ROUND, s.get(ROUND));
    }

    function _newest(uint256 run, uint256 round) private view returns (Run storage r, State s, uint256 site) {
        site = siteOf(msg.sender);
        (r, s) = _run(run);
        if (round == 0 || round != s.get(ROUND)) revert WrongRound(round, s.get(ROUND));
    }

    function _ballot(uint256 round, bytes32 checkpoint, bytes32 manifest) private pure returns (bytes32) {
        return keccak256(abi.encode(round, checkpoint, manifest));
    }

    /// @dev No accepting ballot has this hash: its digests are not 0.
    function _rejection(uint256 round) private pure returns (bytes32) { return _ballot(round, 0, 0); }

    // ------------------------------------------------------------------ views

    function phaseAt(uint256 run, uint256 round, uint256 timestamp) external view returns (Phase, Outcome) {
        (Run storage r, State s) = _run(run);
        if (round == s.get(ROUND)) return s.phase(timestamp);
        if (round == 0 || round > s.get(ROUND)) return (Phase.None, Outcome.Pending);
        return (Phase.Closed, Outcome((r.outcomes[round >> 7] >> ((round & 127) << 1)) & 3));
    }

    function acceptingOf(uint256 run, bytes32 checkpoint, bytes32 manifest) external view returns (uint256) {
        (Run storage r, State s) = _run(run);
        bytes32 ballot = _ballot(s.get(ROUND), checkpoint, manifest);
        return s.has(VOTED) && r.front == ballot ? r.accepting & r.members : r.cast[ballot];
    }

    function viewRun(uint256 run, uint256 timestamp) external view returns (RunView memory v) {
        (Run storage r, State s) = _run(run);
        v.terms = Terms(
            uint32(s.get(COMMIT_WINDOW)), uint32(s.get(VOTE_WINDOW)), uint16(s.get(SITES_MIN)), uint16(s.get(QUORUM_BPS))
        );
        (v.spec, v.proposer, v.successor) = (r.spec, s.get(PROPOSER), successor);
        v.joined = activeSites == 0 ? r.joined : r.joined & activeSites;
        (v.phase, v.outcome) = s.phase(timestamp == 0 ? block.timestamp : timestamp);
        (v.round, v.quorum, v.head) = (s.get(ROUND), s.get(QUORUM), r.head);
        if (s.get(ROUND) != 0) {
            v.members = r.members;
            (v.commitDeadline, v.voteDeadline) = (s.get(COMMIT_END), s.voteDeadline());
            v.expected = s.has(PARTIAL) ? r.expected : r.members;
        }
        if (s.has(COMMITTED)) v.committed = r.committed & r.members;
        if (s.has(ASTRAY)) (v.voted, v.rejecting) = (r.astray, r.cast[_rejection(s.get(ROUND))]);
        if (s.has(VOTED)) v.voted |= r.accepting & r.members;
        (v.finalizedRound, v.failures, v.rejections) = (s.get(FINALIZED_ROUND), s.get(FAILURES), s.get(REJECTIONS));
        if (s.get(FINALIZED_ROUND) != 0) (v.checkpoint, v.manifest) = (r.checkpoint, r.manifest);
        v.commitments = new bytes32[](siteCount());
        for (uint256 i = 0; i < v.commitments.length; ++i) {
            if (v.committed.has(i)) v.commitments[i] = r.commitments[i];
        }
    }

    function computeCommitment(
        uint256 run, uint256 round, uint256 site, bytes32 digest, uint256 samples, bytes32 salt
    ) external view returns (bytes32) {
        return keccak256(
            abi.encode(COMMITMENT_TYPE, block.chainid, address(this), run, round, site, digest, samples, salt)
        );
    }
}
