// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Swarm} from "../Swarm.sol";
import {Base, vm} from "./Base.t.sol";

interface VmSlots {
    function record() external;
    function accesses(address target) external returns (bytes32[] memory reads, bytes32[] memory writes);
    function load(address target, bytes32 slot) external view returns (bytes32);
}

/// @dev What calls cost is what slots they touch; gas itself is measured by bench/gas.py from receipts.
contract SlotsTest is Base {
    VmSlots private constant slots = VmSlots(address(vm));
    bytes32[] private seen;

    /// @dev Distinct slots that `call_` reads and writes.
    function touch(uint256 site, bytes memory call_) internal returns (uint256 reads, uint256 writes) {
        slots.record();
        (bool done,) = attempt(key(site), call_);
        assertTrue(done, "went through");
        (bytes32[] memory read, bytes32[] memory written) = slots.accesses(address(swarm));
        return (distinct(read), distinct(written));
    }

    function distinct(bytes32[] memory found) internal pure returns (uint256 n) {
        for (uint256 i = 0; i < found.length; ++i) {
            bool known;
            for (uint256 j = 0; j < i; ++j) known = known || found[j] == found[i];
            if (!known) ++n;
        }
    }

    function touchCommit(uint256 site, uint256 round) internal returns (uint256, uint256) {
        return touch(site, abi.encodeCall(ISwarm.commit, (run, round, commitmentOf(site, round))));
    }

    function touchVote(uint256 site, uint256 round, bytes32 checkpoint, bool accept)
        internal
        returns (uint256, uint256)
    {
        return touch(site, abi.encodeCall(ISwarm.vote, (run, round, checkpoint, M1, accept, 1)));
    }

    function assertTouched(uint256 reads, uint256 writes, uint256 readsMax, uint256 writesMax, string memory what)
        internal
        pure
    {
        assertTrue(reads <= readsMax && writes <= writesMax, what);
    }

    /// @dev Index, state, mask, commitment: four slots, two of them written; three where the state moves.
    function test_slots_of_a_commitment() public {
        found(10);
        open(0);
        finalizeTen(1);
        open(0);
        for (uint256 i = 0; i < 10; ++i) {
            (uint256 reads, uint256 writes) = touchCommit(i, 2);
            bool moves = i < 2 || i == 9; // the first, the one that makes them enough, the last
            assertTouched(reads, writes, i == 0 ? 5 : 4, moves ? 3 : 2, "commit");
        }
    }

    /// @dev Index, state, mask, front-runner: four slots, one of them written.
    function test_slots_of_a_vote() public {
        found(10);
        open(0);
        finalizeTen(1);
        open(0);
        for (uint256 i = 0; i < 10; ++i) commit(i, 2);
        for (uint256 i = 0; i < 10; ++i) {
            (uint256 reads, uint256 writes) = touchVote(i, 2, C2, true);
            if (i == 0) assertTouched(reads, writes, 5, 3, "first vote");
            else if (i == 5) assertTouched(reads, writes, 7, 5, "deciding vote");
            else assertTouched(reads, writes, 4, 1, "vote");
        }
    }

    /// @dev Index, state, joined, active, committed, members, outcomes: seven slots, two of them written.
    function test_slots_of_an_opening() public {
        found(10);
        open(0);
        finalizeTen(1);
        (uint256 reads, uint256 writes) = touch(3, abi.encodeCall(ISwarm.openRound, (run)));
        assertTouched(reads, writes, 7, 3, "open"); // members are written as they were
    }

    function finalizeTen(uint256 round) internal {
        for (uint256 i = 0; i < 10; ++i) commit(i, round);
        for (uint256 i = 0; i < 10; ++i) vote(i, round, C1, true);
    }

    /// @dev As many sites as there may be: the same slots.
    function test_slots_do_not_grow_with_the_sites() public {
        found(256);
        open(0);
        for (uint256 i = 0; i < 256; ++i) {
            (uint256 reads, uint256 writes) = touchCommit(i, 1);
            assertTouched(reads, writes, i == 0 ? 5 : 4, i < 2 || i == 255 ? 3 : 2, "commit");
        }
        for (uint256 i = 0; i < 256; ++i) {
            (uint256 reads, uint256 writes) = touchVote(i, 1, C1, true);
            if (i != 0 && i != 128) assertTouched(reads, writes, 4, 1, "vote");
        }
    }

    /// @dev proposeRun and joinRun pay for the slots, so that the first round costs what the thousandth does.
    function test_slots_of_the_first_round_are_paid_for() public {
        slots.record();
        open(0);
        finalize(1, C1);
        (, bytes32[] memory written) = slots.accesses(address(swarm));
        found(SITES); // the same once more, before its first round
        for (uint256 i = 0; i < written.length; ++i) {
            assertTrue(slots.load(address(swarm), written[i]) != 0, "paid for");
        }
    }

    /// @dev Leaving and joining again must not pay twice, nor lose what is there.
    function test_joining_again_keeps_the_commitment() public {
        open(0);
        commit(3, 1);
        leave(3);
        join(3);
        assertEq(view_().commitments[3], commitmentOf(3, 1), "still there");
    }
}
