// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @notice Sets of at most 256 sites as masks.
library Bits {
    function bit(uint256 index) internal pure returns (uint256) { return 1 << index; }

    function has(uint256 mask, uint256 index) internal pure returns (bool) { return (mask >> index) & 1 == 1; }

    /// @dev Population count in constant gas (Warren, Hacker's Delight, 5-1). The sum of 32 bytes of at most 8 each
    /// can reach 256 and would overflow the top byte, so the all-ones mask is told apart.
    function count(uint256 mask) internal pure returns (uint256) {
        if (mask == type(uint256).max) return 256;
        unchecked {
            uint256 x = mask;
            x -= (x >> 1) & 0x5555555555555555555555555555555555555555555555555555555555555555;
            x = (x & 0x3333333333333333333333333333333333333333333333333333333333333333)
                + ((x >> 2) & 0x3333333333333333333333333333333333333333333333333333333333333333);
            x = (x + (x >> 4)) & 0x0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f;
            return (x * 0x0101010101010101010101010101010101010101010101010101010101010101) >> 248;
        }
    }
}
