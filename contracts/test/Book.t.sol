// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";

/// @dev What should be so, written the plain way: arrays instead of masks, nothing packed, no slot reused, every rule a
/// sentence. It knows the contract's words and nothing of its inside. `may…` asks whether a call is legal, the verbs
/// write it down.
abstract contract Book {
    uint256 public constant SITES_MAX = 8; // far from the contract's own limit, which unit tests try
    uint256 public constant RUNS = 2;
    uint256 internal constant MONTH = 30 days;

    struct Proposal {
        ISwarm.Change kind;
        address subject;
        bytes32 data;
        uint256 deadline;
        bool executed;
        bool[SITES_MAX] approved;
    }

    struct Ballot {
        bool cast;
        bool accept;
        bytes32 checkpoint;
    }

    struct Round {
        bool[SITES_MAX] member;
        bool[SITES_MAX] expected;
        bytes32[SITES_MAX] commitments;
        Ballot[SITES_MAX] ballots;
        uint256 members;
        uint256 quorum;
        uint256 commitEnd; // moves forward when the last expected site has come
        uint256 voteWindow;
        uint256 sitesMin;
        ISwarm.Outcome decided; // Finalized, Rejected, or Pending
        bytes32 checkpoint;
    }

    struct Run {
        ISwarm.Terms terms;
        bool[SITES_MAX] joined; // removed sites fall out when someone joins or leaves
        bool[SITES_MAX] announced;
        Round[] rounds; // rounds[n - 1] is round n
        bytes32 head;
        uint256 finalized;
    }

    address[] internal keys; // by site
    bool[SITES_MAX] internal active;
    Proposal[] internal proposals; // proposals[n - 1] is proposal n
    Run[RUNS + 1] internal runs; // runs[0] stays empty

    // ------------------------------------------------------------------ membership

    function siteOf(address key) public view returns (bool found, uint256 site) {
        for (uint256 i = 0; i < keys.length; ++i) {
            if (active[i] && keys[i] == key) return (true, i);
        }
    }

    function countActive() public view returns (uint256 n) {
        for (uint256 i = 0; i < keys.length; ++i) {
            if (active[i]) ++n;
        }
    }

    function isPossible(ISwarm.Change kind, address subject, bytes32 data) internal view returns (bool) {
        (bool isSite,) = siteOf(subject);
        if (kind == ISwarm.Change.Admit) return subject != address(0) && data != 0 && !isSite;
        if (kind == ISwarm.Change.RotateKey) {
            (bool taken,) = siteOf(address(uint160(uint256(data))));
            return isSite && uint160(uint256(data)) != 0 && uint256(data) >> 160 == 0 && !taken;
        }
        if (kind == ISwarm.Change.Retire) return subject.code.length != 0;
        return isSite && countActive() > 1 && !isNeeded();
    }

    /// @dev Whether some run that can go on needs every site there is.
    function isNeeded() internal view returns (bool) {
        for (uint256 run = 1; run <= RUNS; ++run) {
            uint256 sitesMin = runs[run].terms.sitesMin;
            if (count(runs[run].joined) >= sitesMin && sitesMin == countActive()) return true;
        }
        return false;
    }

    function hasMajority(Proposal storage p) internal view returns (bool) {
        uint256 approving;
        for (uint256 i = 0; i < keys.length; ++i) {
            if (active[i] && p.approved[i]) ++approving;
        }
        return approving * 2 > countActive();
    }

    function write(Proposal storage p) internal {
        if (!hasMajority(p)) return;
        p.executed = true;
        (, uint256 site) = siteOf(p.subject);
        if (p.kind == ISwarm.Change.Admit) {
            active[keys.length] = true;
            keys.push(p.subject);
        }
        if (p.kind == ISwarm.Change.Remove) active[site] = false;
        if (p.kind == ISwarm.Change.RotateKey) keys[site] = address(uint160(uint256(p.data)));
    }

    // ------------------------------------------------------------------ runs

    function countJoined(uint256 run) public view returns (uint256 n) {
        for (uint256 i = 0; i < keys.length; ++i) {
            if (isJoined(run, i)) ++n;
        }
    }

    function isJoined(uint256 run, uint256 site) public view returns (bool) {
        return runs[run].joined[site] && active[site];
    }

    function writeJoined(uint256 run, uint256 site, bool joined) internal {
        Run storage r = runs[run];
        for (uint256 i = 0; i < keys.length; ++i) r.joined[i] = r.joined[i] && active[i];
        r.joined[site] = joined;
        if (joined) r.announced[site] = true;
    }

    // ------------------------------------------------------------------ rounds

    function phaseOf(uint256 run, uint256 n) public view returns (ISwarm.Phase, ISwarm.Outcome) {
        if (n == 0) return (ISwarm.Phase.None, ISwarm.Outcome.Pending);
        Round storage r = runs[run].rounds[n - 1];
        if (r.decided != ISwarm.Outcome.Pending) return (ISwarm.Phase.Closed, r.decided);
        if (n < runs[run].rounds.length) return (ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
        if (block.timestamp < r.commitEnd) return (ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
        bool voting = countCommitted(r) >= r.sitesMin && block.timestamp < r.commitEnd + r.voteWindow;
        if (voting) return (ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        return (ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
    }

    function mayOpen(uint256 run, uint256 site) internal view returns (bool) {
        (ISwarm.Phase phase,) = phaseOf(run, runs[run].rounds.length);
        bool closed = phase == ISwarm.Phase.None || phase == ISwarm.Phase.Closed;
        return isJoined(run, site) && closed && countJoined(run) >= runs[run].terms.sitesMin;
    }

    function writeOpened(uint256 run) internal {
        Run storage r = runs[run];
        uint256 n = r.rounds.length;
        Round storage round = r.rounds.push();
        bool known;
        for (uint256 i = 0; i < keys.length; ++i) {
            round.member[i] = isJoined(run, i);
            bool came = n > 0 && r.rounds[n - 1].commitments[i] != 0;
            round.expected[i] = round.member[i] && (came || r.announced[i]);
            known = known || round.expected[i];
        }
        if (!known) round.expected = round.member;
        for (uint256 i = 0; i < SITES_MAX; ++i) r.announced[i] = false;
        round.members = count(round.member);
        round.quorum = round.members / 2 + 1;
        uint256 share = (round.members * r.terms.quorumBps + 9_999) / 10_000;
        if (share > round.quorum) round.quorum = share;
        round.commitEnd = block.timestamp + r.terms.commitWindow;
        (round.voteWindow, round.sitesMin) = (r.terms.voteWindow, r.terms.sitesMin);
    }

    function mayCommit(uint256 run, uint256 site, bytes32 commitment) internal view returns (bool) {
        uint256 n = runs[run].rounds.length;
        (ISwarm.Phase phase,) = phaseOf(run, n);
        if (phase != ISwarm.Phase.Commit || !active[site] || commitment == 0) return false;
        Round storage r = runs[run].rounds[n - 1];
        return r.member[site] && r.commitments[site] == 0;
    }

    function writeCommitted(uint256 run, uint256 site, bytes32 commitment) internal {
        Round storage r = runs[run].rounds[runs[run].rounds.length - 1];
        r.commitments[site] = commitment;
        bool all = countCommitted(r) >= r.sitesMin;
        for (uint256 i = 0; i < SITES_MAX; ++i) {
            if (r.expected[i] && r.commitments[i] == 0) all = false;
        }
        if (all) r.commitEnd = block.timestamp;
    }

    function mayVote(uint256 run, uint256 site) internal view returns (bool) {
        uint256 n = runs[run].rounds.length;
        if (n == 0 || !active[site]) return false;
        Round storage r = runs[run].rounds[n - 1];
        (ISwarm.Phase phase,) = phaseOf(run, n);
        bool late = r.decided != ISwarm.Outcome.Pending && !r.ballots[site].cast
            && block.timestamp < r.commitEnd + r.voteWindow;
        return r.member[site] && (phase == ISwarm.Phase.Vote || late);
    }

    function writeVote(uint256 run, uint256 site, Ballot memory ballot) internal {
        uint256 n = runs[run].rounds.length;
        Round storage r = runs[run].rounds[n - 1];
        r.ballots[site] = ballot;
        if (r.decided != ISwarm.Outcome.Pending) return;
        uint256 accepting;
        uint256 rejecting;
        for (uint256 i = 0; i < SITES_MAX; ++i) {
            Ballot memory b = r.ballots[i];
            if (b.cast && !b.accept) ++rejecting;
            if (b.cast && b.accept && b.checkpoint == ballot.checkpoint) ++accepting;
        }
        if (ballot.accept && accepting >= r.quorum) {
            (r.decided, r.checkpoint) = (ISwarm.Outcome.Finalized, ballot.checkpoint);
            runs[run].head = keccak256(
                abi.encode(runs[run].head, n, ballot.checkpoint, manifestOf(ballot.checkpoint))
            );
            runs[run].finalized = n;
        } else if (rejecting + r.quorum > r.members) {
            r.decided = ISwarm.Outcome.Rejected;
        }
    }

    // ------------------------------------------------------------------ counting

    function count(bool[SITES_MAX] storage flags) internal view returns (uint256 n) {
        for (uint256 i = 0; i < SITES_MAX; ++i) {
            if (flags[i]) ++n;
        }
    }

    function countCommitted(Round storage r) internal view returns (uint256 n) {
        for (uint256 i = 0; i < SITES_MAX; ++i) {
            if (r.commitments[i] != 0) ++n;
        }
    }

    function manifestOf(bytes32 checkpoint) public pure returns (bytes32) {
        return keccak256(abi.encode("manifest", checkpoint));
    }

    // ------------------------------------------------------------------ for the invariants to read

    function keyCount() external view returns (uint256) {
        return keys.length;
    }

    function keyAt(uint256 site) external view returns (address) {
        return keys[site];
    }

    function isActive(uint256 site) external view returns (bool) {
        return active[site];
    }

    function proposalCount() external view returns (uint256) {
        return proposals.length;
    }

    function proposalAt(uint256 n) external view returns (bool executed, uint256 approvals) {
        Proposal storage p = proposals[n - 1];
        executed = p.executed;
        for (uint256 i = 0; i < SITES_MAX; ++i) {
            if (p.approved[i]) approvals |= 1 << i;
        }
    }

    function roundCount(uint256 run) external view returns (uint256) {
        return runs[run].rounds.length;
    }

    function headOf(uint256 run) external view returns (bytes32 head, uint256 finalized, bytes32 checkpoint) {
        (head, finalized) = (runs[run].head, runs[run].finalized);
        if (finalized != 0) checkpoint = runs[run].rounds[finalized - 1].checkpoint;
    }

    function roundAt(uint256 run, uint256 n)
        external
        view
        returns (uint256 quorum, uint256 commitEnd, uint256[5] memory masks, bytes32[SITES_MAX] memory commitments)
    {
        Round storage r = runs[run].rounds[n - 1];
        (quorum, commitEnd, commitments) = (r.quorum, r.commitEnd, r.commitments);
        for (uint256 i = 0; i < SITES_MAX; ++i) {
            if (r.member[i]) masks[0] |= 1 << i;
            if (r.expected[i]) masks[1] |= 1 << i;
            if (r.commitments[i] != 0) masks[2] |= 1 << i;
            if (r.ballots[i].cast) masks[3] |= 1 << i;
            if (r.ballots[i].cast && !r.ballots[i].accept) masks[4] |= 1 << i;
        }
    }

    /// @dev Rounds in a row, and rejected rounds, before round `n` and since the last finalized one.
    function failuresBefore(uint256 run, uint256 n) external view returns (uint256 failures, uint256 rejections) {
        for (uint256 i = n - 1; i >= 1; --i) {
            (, ISwarm.Outcome outcome) = phaseOf(run, i);
            if (outcome == ISwarm.Outcome.Finalized) break;
            ++failures;
            if (outcome == ISwarm.Outcome.Rejected) ++rejections;
        }
    }

    function acceptingIn(uint256 run, bytes32 checkpoint) external view returns (uint256 mask) {
        Round[] storage rounds = runs[run].rounds;
        for (uint256 i = 0; rounds.length != 0 && i < SITES_MAX; ++i) {
            Ballot storage b = rounds[rounds.length - 1].ballots[i];
            if (b.cast && b.accept && b.checkpoint == checkpoint) mask |= 1 << i;
        }
    }
}
