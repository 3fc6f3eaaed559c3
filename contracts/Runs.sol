// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Bits} from "./Bits.sol";
import {Membership} from "./Membership.sol";
import "./Phases.sol";

/// @notice What is trained: runs, their terms, and who takes part.
abstract contract Runs is Membership {
    using Bits for uint256;

    /// @dev Seconds. Long enough for any training, short enough that no run is stuck for good.
    uint256 internal constant WINDOW_MAX = 90 days;
    uint256 internal constant BPS = 10_000;

    /// @dev One slot per line, but for the maps. The slots from `announced` on serve every round in turn, and hold what
    /// an earlier round left there until the flags of `state` say otherwise: nothing is paid for clearing them.
    ///
    ///     committed:  255 ... i ... 0     bit i: site i has committed, or is no member
    ///     accepting:  255 ... i ... 0     bit i: site i accepts `front`, or is no member
    ///
    /// so that one read says who may (still) do so. All other masks: bit i means site i, and nothing else.
    struct Run {
        State state;
        bytes32 spec;
        uint256 joined; // may hold removed sites until the next change; openRound and viewRun leave them out
        uint256 members;
        bytes32 checkpoint;
        bytes32 manifest;
        bytes32 head;
        uint256 announced; // since the newest round opened; joining announces too
        uint256 expected;
        uint256 committed;
        bytes32 front; // the first ballot of the round that accepts; honest sites cast no other
        uint256 accepting;
        uint256 astray; // members whose vote lies elsewhere: another ballot, or a rejection
        mapping(uint256 site => bytes32) commitments; // the site's newest one, of whatever round
        mapping(uint256 site => bytes32) ballots; // of a site astray
        mapping(bytes32 ballot => uint256 mask) cast; // on ballots other than `front`; each names its round
        mapping(uint256 word => uint256) outcomes; // two bits for each round before the newest, 128 rounds a word
    }

    mapping(uint256 run => Run) private _runs;
    uint256 public runCount;

    function proposeRun(bytes32 spec, Terms calldata terms) external returns (uint256 run) {
        uint256 site = _activeSite();
        run = ++runCount;
        if (spec == 0) revert EmptyDigest(run, 0);
        _requireWindow(terms.commitWindow);
        _requireWindow(terms.voteWindow);
        uint256 sites = activeSites.count();
        if (terms.sitesMin == 0 || terms.sitesMin > sites) revert SitesMinOutOfRange(terms.sitesMin, sites);
        if (terms.quorumBps > BPS) revert QuorumOutOfRange(terms.quorumBps, BPS);
        Run storage r = _runs[run];
        (r.spec, r.head) = (spec, spec);
        r.state = State.wrap(0).set(COMMIT_WINDOW, terms.commitWindow).set(VOTE_WINDOW, terms.voteWindow)
            .set(QUORUM_BPS, terms.quorumBps).set(SITES_MIN, terms.sitesMin).set(PROPOSER, site);
        _prepay(r, spec);
        emit RunProposed(run, spec, site, terms);
    }

    function joinRun(uint256 run) external {
        uint256 site = _activeSite();
        (Run storage r,) = _run(run);
        if (r.joined.has(site)) revert AlreadyJoined(run, site);
        _setJoined(r, r.joined | Bits.bit(site));
        _announce(r, site);
        if (r.commitments[site] == 0) r.commitments[site] = r.spec;
        emit RunJoined(run, site);
    }

    function leaveRun(uint256 run) external {
        (Run storage r,, uint256 site) = _joinedRun(run);
        _setJoined(r, r.joined & ~Bits.bit(site));
        emit RunLeft(run, site);
    }

    function announce(uint256 run) external {
        (Run storage r,, uint256 site) = _joinedRun(run);
        _announce(r, site);
        emit Announced(run, site);
    }

    function _announce(Run storage r, uint256 site) private {
        r.announced = (r.state.has(ANNOUNCED) ? r.announced : 0) | Bits.bit(site);
        r.state = r.state.with(ANNOUNCED);
    }

    /// @dev Puts something into each slot that rounds will write, so that the first costs what the thousandth does.
    function _prepay(Run storage r, bytes32 spec) private {
        (r.members, r.committed, r.accepting, r.outcomes[0]) = (1, 1, 1, 1); // anything but 0
        (r.front, r.checkpoint, r.manifest) = (spec, spec, spec);
    }

    /// @dev Keeps `_runsNeeding` true.
    function _setJoined(Run storage r, uint256 joined) private {
        uint256 sitesMin = r.state.get(SITES_MIN);
        if (activeSites != 0) joined &= activeSites;
        if (r.joined.count() >= sitesMin) --_runsNeeding[sitesMin];
        if (joined.count() >= sitesMin) ++_runsNeeding[sitesMin];
        r.joined = joined;
    }

    function _run(uint256 run) internal view returns (Run storage r, State s) {
        r = _runs[run];
        s = r.state;
        if (s.get(SITES_MIN) == 0) revert UnknownRun(run, runCount);
    }

    function _joinedRun(uint256 run) internal view returns (Run storage r, State s, uint256 site) {
        site = siteOf(msg.sender);
        (r, s) = _run(run);
        if (!r.joined.has(site)) revert NotJoined(run, site);
    }

    function _requireWindow(uint256 windowS) private pure {
        if (windowS == 0 || windowS > WINDOW_MAX) revert WindowOutOfRange(windowS, WINDOW_MAX);
    }
}
