// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "./ISwarm.sol";

/// @notice The newest round of a run in one storage word.
/// @dev Bit layout, low to high:
///
///     0        32        72            112         152         184     200       216         224      232      240     248
///     | round  | openedAt | commitDeadline | votingFrom | finalized | quorum | failures | rejections | outcome | enough | anyCommit | anyVote
///       32       40         40               40           32          16       16         8            8         8        8           8
struct Clock {
    uint32 round;
    uint40 openedAt;
    uint40 commitDeadline;
    uint40 votingFrom; // when the last expected site committed; 0 while the deadline rules
    uint32 finalizedRound;
    uint16 quorum;
    uint16 failures;
    uint8 rejections;
    ISwarm.Outcome outcome; // Finalized or Rejected once decided; Expired is computed
    bool enough; // at least sitesMin commitments
    bool anyCommit; // false: `committed` still holds the mask of an earlier round
    bool anyVote; // false: `voted` and `rejecting` still hold the masks of an earlier round
}

/// @notice Pure rules of time and number.
library Phases {
    /// @notice When the Commit phase ends: early when every expected site has committed, else at its deadline.
    function commitEnd(Clock memory c) internal pure returns (uint256) {
        return c.votingFrom != 0 ? c.votingFrom : c.commitDeadline;
    }

    function voteDeadline(Clock memory c, uint256 voteWindow) internal pure returns (uint256) {
        return commitEnd(c) + voteWindow;
    }

    /// @notice Phase and outcome of the newest round at time `t`.
    function phase(Clock memory c, uint256 voteWindow, uint256 t)
        internal
        pure
        returns (ISwarm.Phase, ISwarm.Outcome)
    {
        if (c.round == 0) return (ISwarm.Phase.None, ISwarm.Outcome.Pending);
        if (c.outcome != ISwarm.Outcome.Pending) return (ISwarm.Phase.Closed, c.outcome);
        if (t < commitEnd(c)) return (ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
        if (c.enough && t < voteDeadline(c, voteWindow)) return (ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        return (ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
    }

    /// @notice Accepting members that a round needs: a majority, or the run's higher share, rounded up.
    function quorum(uint256 members, uint256 quorumBps) internal pure returns (uint256) {
        uint256 majority = members / 2 + 1;
        uint256 share = (members * quorumBps + 9_999) / 10_000;
        return share > majority ? share : majority;
    }
}
