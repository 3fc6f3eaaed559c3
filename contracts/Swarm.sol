// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "./ISwarm.sol";
import {Membership} from "./Membership.sol";
import {Rounds} from "./Rounds.sol";

/// @notice One consortium. Read `ISwarm` for the law; this only puts its parts together.
contract Swarm is Rounds {
    constructor(ISwarm.Founder[] memory founders) Membership(founders) {}
}
