// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "./ISwarm.sol";

/// @notice A run's terms and its newest round in one storage word, read once by every call. Bits, low to high:
///
///     0       32          64          104            128          152         168        184       200      216        232        240          248     256
///     | round | finalized | commitEnd | commitWindow | voteWindow | quorumBps | sitesMin | members | quorum | proposer | failures | rejections | flags |
///
type State is uint256;

using Phases for State global;

// Fields of the word: first bit and number of bits.
uint256 constant ROUND = 0 << 8 | 32;
uint256 constant FINALIZED_ROUND = 32 << 8 | 32; // the newest one
uint256 constant COMMIT_END = 64 << 8 | 40; // the commit deadline, or the moment when the last expected site committed
uint256 constant COMMIT_WINDOW = 104 << 8 | 24;
uint256 constant VOTE_WINDOW = 128 << 8 | 24;
uint256 constant QUORUM_BPS = 152 << 8 | 16;
uint256 constant SITES_MIN = 168 << 8 | 16; // 0 where there is no such run
uint256 constant MEMBERS = 184 << 8 | 16; // how many
uint256 constant QUORUM = 200 << 8 | 16;
uint256 constant PROPOSER = 216 << 8 | 16;
uint256 constant FAILURES = 232 << 8 | 8; // in a row; 255 at most
uint256 constant REJECTIONS = 240 << 8 | 8; // among them; 255 at most
uint256 constant FLAGS = 248 << 8 | 8; // the outcome in two bits once it is decided (Expired is computed), and the flags below

// Slots are reused by every round; without its flag, a slot still holds what an earlier round left there.
uint256 constant COMMITTED = 4; // `committed` is this round's
uint256 constant ENOUGH = 8; // at least sitesMin have committed
uint256 constant VOTED = 16; // `front` and `accepting` are this round's
uint256 constant ASTRAY = 32; // `astray` is this round's
uint256 constant ANNOUNCED = 64; // `announced` is not empty
uint256 constant PARTIAL = 128; // not all members are expected: `expected` is this round's

/// @notice The word's fields, and the pure rules of time and number.
library Phases {
    function get(State s, uint256 field) internal pure returns (uint256) {
        return State.unwrap(s) >> (field >> 8) & (1 << (field & 255)) - 1;
    }

    /// @dev `value` must fit.
    function set(State s, uint256 field, uint256 value) internal pure returns (State) {
        uint256 hole = ~(((1 << (field & 255)) - 1) << (field >> 8));
        return State.wrap(State.unwrap(s) & hole | value << (field >> 8));
    }

    function has(State s, uint256 flag) internal pure returns (bool) { return get(s, FLAGS) & flag != 0; }

    function with(State s, uint256 flag) internal pure returns (State) { return set(s, FLAGS, get(s, FLAGS) | flag); }

    function outcome(State s) internal pure returns (ISwarm.Outcome) { return ISwarm.Outcome(get(s, FLAGS) & 3); }

    function voteDeadline(State s) internal pure returns (uint256) {
        return get(s, COMMIT_END) + get(s, VOTE_WINDOW);
    }

    /// @notice Phase and outcome of the newest round at time `t`.
    function phase(State s, uint256 t) internal pure returns (ISwarm.Phase, ISwarm.Outcome) {
        if (get(s, ROUND) == 0) return (ISwarm.Phase.None, ISwarm.Outcome.Pending);
        if (outcome(s) != ISwarm.Outcome.Pending) return (ISwarm.Phase.Closed, outcome(s));
        if (t < get(s, COMMIT_END)) return (ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
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
