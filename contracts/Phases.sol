// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "./ISwarm.sol";

/// @notice A run's terms and its newest round in one storage word, read once by every call. Bits, low to high:
///
///     0       32          64          104            128          152         168        184       200      216        232        240          248     256
///     | round | finalized | commitEnd | commitWindow | voteWindow | quorumBps | sitesMin | members | quorum | proposer | failures | rejections | flags |
///
/// @dev sitesMin is 0 where there is no such run. commitEnd is the commit deadline, or the moment when the last
/// expected site committed. The two lowest flags are the outcome once it is decided; Expired is computed.
type State is uint256;

using Phases for State global;

// Slots are reused by every round; without its flag, a slot still holds what an earlier round left there.
uint256 constant COMMITTED = 4; // `committed` is this round's
uint256 constant ENOUGH = 8; // at least sitesMin have committed
uint256 constant VOTED = 16; // `front` and `accepting` are this round's
uint256 constant ASTRAY = 32; // `astray` is this round's
uint256 constant ANNOUNCED = 64; // `announced` is not empty
uint256 constant PARTIAL = 128; // not all members are expected: `expected` is this round's

/// @notice The word's fields, and the pure rules of time and number.
library Phases {
    function round(State s) internal pure returns (uint256) { return uint32(State.unwrap(s)); }
    function finalizedRound(State s) internal pure returns (uint256) { return uint32(State.unwrap(s) >> 32); }
    function commitEnd(State s) internal pure returns (uint256) { return uint40(State.unwrap(s) >> 64); }
    function commitWindow(State s) internal pure returns (uint256) { return uint24(State.unwrap(s) >> 104); }
    function voteWindow(State s) internal pure returns (uint256) { return uint24(State.unwrap(s) >> 128); }
    function quorumBps(State s) internal pure returns (uint256) { return uint16(State.unwrap(s) >> 152); }
    function sitesMin(State s) internal pure returns (uint256) { return uint16(State.unwrap(s) >> 168); }
    function members(State s) internal pure returns (uint256) { return uint16(State.unwrap(s) >> 184); }
    function quorum(State s) internal pure returns (uint256) { return uint16(State.unwrap(s) >> 200); }
    function proposer(State s) internal pure returns (uint256) { return uint16(State.unwrap(s) >> 216); }
    function failures(State s) internal pure returns (uint256) { return uint8(State.unwrap(s) >> 232); }
    function rejections(State s) internal pure returns (uint256) { return uint8(State.unwrap(s) >> 240); }
    function has(State s, uint256 flag) internal pure returns (bool) { return State.unwrap(s) >> 248 & flag != 0; }

    function outcome(State s) internal pure returns (ISwarm.Outcome) {
        return ISwarm.Outcome(State.unwrap(s) >> 248 & 3);
    }

    function with(State s, uint256 flag) internal pure returns (State) {
        return State.wrap(State.unwrap(s) | flag << 248);
    }

    function decide(State s, ISwarm.Outcome decision) internal pure returns (State) {
        return with(s, uint256(decision));
    }

    /// @dev `at` and `bits` as in the drawing; `value` must fit.
    function set(State s, uint256 at, uint256 bits, uint256 value) internal pure returns (State) {
        return State.wrap(State.unwrap(s) & ~(((1 << bits) - 1) << at) | value << at);
    }

    function voteDeadline(State s) internal pure returns (uint256) { return commitEnd(s) + voteWindow(s); }

    /// @notice Phase and outcome of the newest round at time `t`.
    function phase(State s, uint256 t) internal pure returns (ISwarm.Phase, ISwarm.Outcome) {
        if (round(s) == 0) return (ISwarm.Phase.None, ISwarm.Outcome.Pending);
        if (outcome(s) != ISwarm.Outcome.Pending) return (ISwarm.Phase.Closed, outcome(s));
        if (t < commitEnd(s)) return (ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
        if (has(s, ENOUGH) && t < voteDeadline(s)) return (ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        return (ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
    }

    /// @notice Accepting members that a round needs: a majority, or the run's higher share, rounded up.
    function quorumOf(uint256 sites, uint256 bps) internal pure returns (uint256) {
        uint256 majority = sites / 2 + 1;
        uint256 share = (sites * bps + 9_999) / 10_000;
        return share > majority ? share : majority;
    }
}
