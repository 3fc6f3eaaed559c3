// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Swarm} from "../Swarm.sol";

struct Log {
    bytes32[] topics;
    bytes data;
    address emitter;
}

/// @dev The cheat codes that these tests use.
interface Vm {
    function prank(address sender) external;
    function warp(uint256 timestamp) external;
    function chainId(uint256 id) external;
    function expectRevert(bytes calldata data) external;
    function expectEmit(bool topic1, bool topic2, bool topic3, bool data, address emitter) external;
    function cool(address target) external;
    function recordLogs() external;
    function getRecordedLogs() external returns (Log[] memory);
    function envOr(string calldata name, bytes calldata fallback_) external returns (bytes memory);
}

Vm constant vm = Vm(address(uint160(uint256(keccak256("hevm cheat code")))));

/// @dev A consortium; of another contract than ours where SWARM_CREATION_CODE holds one: so mutants meet these tests
/// without a compilation of their own.
function deploySwarm(ISwarm.Founder[] memory founders) returns (Swarm deployed) {
    bytes memory code = vm.envOr("SWARM_CREATION_CODE", bytes(""));
    if (code.length == 0) return new Swarm(founders);
    code = abi.encodePacked(code, abi.encode(founders));
    assembly {
        deployed := create(0, add(code, 0x20), mload(code))
        if iszero(deployed) {
            returndatacopy(0, 0, returndatasize())
            revert(0, returndatasize())
        }
    }
}

function keyOf(uint256 site) pure returns (address) {
    return address(uint160(0x1000 + site));
}

function makeFounders(uint256 count) pure returns (ISwarm.Founder[] memory founders) {
    founders = new ISwarm.Founder[](count);
    for (uint256 i = 0; i < count; ++i) founders[i] = ISwarm.Founder(keyOf(i), bytes32(i + 1));
}

/// @dev Four sites, and one run of them all with windows of 100 and 50 seconds.
abstract contract Base {
    uint256 internal constant SITES = 4;
    uint256 internal constant START = 1_000_000;
    bytes32 internal constant SPEC = keccak256("spec");
    bytes32 internal constant C1 = keccak256("checkpoint 1");
    bytes32 internal constant C2 = keccak256("checkpoint 2");
    bytes32 internal constant M1 = keccak256("manifest 1");
    bytes32 internal constant M2 = keccak256("manifest 2");
    address internal constant OUTSIDER = address(0xbad);

    Swarm internal swarm;
    uint256 internal run;

    function setUp() public virtual {
        found(SITES);
    }

    /// @dev A consortium of `sites`, all of them in one run of two contributions at least.
    function found(uint256 sites) internal {
        vm.warp(START);
        swarm = deploySwarm(makeFounders(sites));
        startRun(100, 50, 2, 0, sites);
    }

    /// @dev From now on `run` is a new one, which the first `joined` sites have joined.
    function startRun(uint32 commitWindow, uint32 voteWindow, uint16 sitesMin, uint16 quorumBps, uint256 joined) internal {
        run = proposeRun(commitWindow, voteWindow, sitesMin, quorumBps);
        for (uint256 i = 0; i < joined; ++i) join(i);
    }

    // ------------------------------------------------------------------ calls

    function key(uint256 site) internal pure returns (address) {
        return keyOf(site);
    }

    function propose(uint256 site, ISwarm.Change kind, address subject, bytes32 data) internal returns (uint256) {
        vm.prank(key(site));
        return swarm.propose(kind, subject, data);
    }

    function approve(uint256 site, uint256 proposal) internal {
        vm.prank(key(site));
        swarm.approve(proposal);
    }

    /// @dev Proposed by site 0 and approved by as many active sites after it as are needed.
    function change(ISwarm.Change kind, address subject, bytes32 data) internal returns (uint256 proposal) {
        proposal = propose(0, kind, subject, data);
        for (uint256 i = 1; !swarm.proposalAt(proposal).executed; ++i) {
            if (swarm.activeSites() >> i & 1 == 0) continue;
            vm.prank(swarm.siteAt(i).key);
            swarm.approve(proposal);
        }
    }

    /// @dev One approval of site 2 short of being carried out.
    function almostChange(ISwarm.Change kind, address subject, bytes32 data) internal returns (uint256 proposal) {
        proposal = propose(0, kind, subject, data);
        approve(1, proposal);
    }

    function admit(uint256 site) internal {
        change(ISwarm.Change.Admit, key(site), bytes32(site + 1));
    }

    function remove(uint256 site) internal {
        change(ISwarm.Change.Remove, key(site), 0);
    }

    function proposeRun(uint32 commitWindow, uint32 voteWindow, uint16 sitesMin, uint16 quorumBps)
        internal
        returns (uint256)
    {
        vm.prank(key(0));
        return swarm.proposeRun(SPEC, ISwarm.Terms(commitWindow, voteWindow, sitesMin, quorumBps));
    }

    function join(uint256 site) internal {
        vm.prank(key(site));
        swarm.joinRun(run);
    }

    function leave(uint256 site) internal {
        vm.prank(key(site));
        swarm.leaveRun(run);
    }

    function announce(uint256 site) internal {
        vm.prank(key(site));
        swarm.announce(run);
    }

    function open(uint256 site) internal {
        vm.prank(key(site));
        swarm.openRound(run);
    }

    function commit(uint256 site, uint256 round) internal {
        vm.prank(key(site));
        swarm.commit(run, round, commitmentOf(site, round));
    }

    function commitmentOf(uint256 site, uint256 round) internal pure returns (bytes32) {
        return keccak256(abi.encode("commitment", site, round));
    }

    function vote(uint256 site, uint256 round, bytes32 checkpoint, bool accept) internal {
        vm.prank(key(site));
        swarm.vote(run, round, checkpoint, M1, accept, 9_000);
    }

    function commitAll(uint256 round) internal {
        for (uint256 i = 0; i < SITES; ++i) commit(i, round);
    }

    /// @dev Everybody commits, a majority accepts.
    function finalize(uint256 round, bytes32 checkpoint) internal {
        commitAll(round);
        for (uint256 i = 0; i < 3; ++i) vote(i, round, checkpoint, true);
    }

    function pass(uint256 seconds_) internal {
        vm.warp(block.timestamp + seconds_);
    }

    // ------------------------------------------------------------------ what is so

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

    function assertEq(bytes32 a, bytes32 b, string memory what) internal pure {
        require(a == b, what);
    }

    function assertEq(address a, address b, string memory what) internal pure {
        require(a == b, what);
    }

    function assertTrue(bool so, string memory what) internal pure {
        require(so, what);
    }

    /// @dev The next call is refused by this name with these two words.
    function expect(bytes4 selector, uint256 a, uint256 b) internal {
        vm.expectRevert(abi.encodeWithSelector(selector, a, b));
    }

    function expect(bytes4 selector, address a) internal {
        vm.expectRevert(abi.encodeWithSelector(selector, a));
    }

    /// @dev Calls as `caller` and returns what came back.
    function attempt(address caller, bytes memory data) internal returns (bool done, bytes memory answer) {
        vm.prank(caller);
        (done, answer) = address(swarm).call(data);
    }

    /// @dev The call is refused with exactly this error.
    function refuse(address caller, bytes memory data, bytes memory reason) internal {
        (bool done, bytes memory answer) = attempt(caller, data);
        assertTrue(!done, "refused");
        assertEq(keccak256(answer), keccak256(reason), "by name and words");
    }
}
