// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Swarm} from "../Swarm.sol";

/// @dev The cheat codes that these tests use.
interface Vm {
    function prank(address sender) external;
    function warp(uint256 timestamp) external;
    function chainId(uint256 id) external;
    function expectRevert(bytes calldata data) external;
    function record() external;
    function accesses(address target) external returns (bytes32[] memory reads, bytes32[] memory writes);
}

/// @dev Four sites, and one run of them all.
abstract contract Base {
    Vm internal constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));
    uint256 internal constant SITES = 4;
    bytes32 internal constant C1 = keccak256("checkpoint 1");
    bytes32 internal constant C2 = keccak256("checkpoint 2");
    bytes32 internal constant M1 = keccak256("manifest 1");
    address internal constant OUTSIDER = address(0xbad);

    Swarm internal swarm;
    uint256 internal run;

    function setUp() public virtual {
        vm.warp(1_000_000);
        ISwarm.Founder[] memory founders = new ISwarm.Founder[](SITES);
        for (uint256 i = 0; i < SITES; ++i) founders[i] = ISwarm.Founder(key(i), bytes32(uint256(i + 1)));
        swarm = new Swarm(founders);
        run = propose(100, 50, 2, 0);
        for (uint256 i = 0; i < SITES; ++i) join(i);
    }

    function key(uint256 site) internal pure returns (address) {
        return address(uint160(0x1000 + site));
    }

    function propose(uint32 commitWindow, uint32 voteWindow, uint16 sitesMin, uint16 quorumBps)
        internal
        returns (uint256)
    {
        vm.prank(key(0));
        return swarm.proposeRun(keccak256("spec"), ISwarm.Terms(commitWindow, voteWindow, sitesMin, quorumBps));
    }

    function join(uint256 site) internal {
        vm.prank(key(site));
        swarm.joinRun(run);
    }

    function open(uint256 site) internal {
        vm.prank(key(site));
        swarm.openRound(run);
    }

    function commit(uint256 site, uint256 round) internal {
        vm.prank(key(site));
        swarm.commit(run, round, keccak256(abi.encode(site, round)));
    }

    function vote(uint256 site, uint256 round, bytes32 checkpoint, bool accept) internal {
        vm.prank(key(site));
        swarm.vote(run, round, checkpoint, M1, accept, 9_000);
    }

    function commitAll(uint256 round) internal {
        for (uint256 i = 0; i < SITES; ++i) commit(i, round);
    }

    function finalize(uint256 round, bytes32 checkpoint) internal {
        commitAll(round);
        for (uint256 i = 0; i < 3; ++i) vote(i, round, checkpoint, true);
    }

    function view_() internal view returns (ISwarm.RunView memory) {
        return swarm.viewRun(run, 0);
    }

    function assertPhase(ISwarm.Phase phase, ISwarm.Outcome outcome) internal view {
        ISwarm.RunView memory v = view_();
        require(v.phase == phase, "phase");
        require(v.outcome == outcome, "outcome");
    }

    function assertEq(uint256 a, uint256 b, string memory what) internal pure {
        require(a == b, what);
    }
}
