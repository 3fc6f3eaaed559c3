// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Bits} from "./Bits.sol";
import {Membership} from "./Membership.sol";
import {Clock} from "./Phases.sol";

/// @notice What is trained: runs, their terms, and who takes part.
abstract contract Runs is Membership {
    using Bits for uint256;

    /// @dev Seconds. Long enough for any training, short enough that no run is stuck for good.
    uint256 internal constant WINDOW_MAX = 90 days;
    uint256 internal constant BPS = 10_000;

    /// @dev One slot per line, but for the maps. `clock` to `rejecting` speak of the newest round and are reused.
    struct Run {
        bytes32 spec;
        Terms terms; // 32 | 32 | 16 | 16 bits, in a slot of its own
        Clock clock;
        uint256 proposer;
        uint256 joined;
        uint256 announced; // since the newest round opened; joining announces too
        uint256 members;
        uint256 expected;
        uint256 committed;
        uint256 voted;
        uint256 rejecting;
        bytes32 checkpoint;
        bytes32 manifest;
        bytes32 head;
        mapping(uint256 site => bytes32) commitments; // the site's newest one, of whatever round
        mapping(uint256 site => bytes32) ballots; // the site's newest one, of whatever round
        mapping(bytes32 ballot => uint256 mask) accepting;
        mapping(uint256 word => uint256) outcomes; // two bits for each round before the newest, 128 rounds a word
    }

    mapping(uint256 run => Run) private _runs;
    uint256 public runCount;

    function proposeRun(bytes32 spec, Terms calldata terms) external returns (uint256 run) {
        uint256 site = siteOf(msg.sender);
        run = ++runCount;
        if (spec == 0) revert EmptyDigest(run, 0);
        _requireWindow(terms.commitWindow);
        _requireWindow(terms.voteWindow);
        if (terms.sitesMin == 0 || terms.sitesMin > siteCount()) {
            revert SitesMinOutOfRange(terms.sitesMin, siteCount());
        }
        if (terms.quorumBps > BPS) revert QuorumOutOfRange(terms.quorumBps, BPS);
        Run storage r = _runs[run];
        r.spec = spec;
        r.terms = terms;
        r.proposer = site;
        emit RunProposed(run, spec, site, terms);
    }

    function joinRun(uint256 run) external {
        uint256 site = siteOf(msg.sender);
        Run storage r = _run(run);
        if (r.joined.has(site)) revert AlreadyJoined(run, site);
        r.joined |= Bits.bit(site);
        r.announced |= Bits.bit(site);
        emit RunJoined(run, site);
    }

    function announce(uint256 run) external {
        (Run storage r, uint256 site) = _joinedRun(run);
        r.announced |= Bits.bit(site);
        emit Announced(run, site);
    }

    function _run(uint256 run) internal view returns (Run storage) {
        if (run == 0 || run > runCount) revert UnknownRun(run, runCount);
        return _runs[run];
    }

    function _joinedRun(uint256 run) internal view returns (Run storage r, uint256 site) {
        site = siteOf(msg.sender);
        r = _run(run);
        if (!r.joined.has(site)) revert NotJoined(run, site);
    }

    function _requireWindow(uint256 windowS) private pure {
        if (windowS == 0 || windowS > WINDOW_MAX) revert WindowOutOfRange(windowS, WINDOW_MAX);
    }
}
