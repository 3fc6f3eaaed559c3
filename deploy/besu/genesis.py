"""Write genesis.json of a QBFT network from its validators' addresses.

    python deploy/besu/genesis.py 0x… 0x… 0x… 0x… > genesis.json

`besu --data-path=DATA public-key export-address` shows the address of a node's key. With fewer than four validators the
chain stands still as soon as one is away: of n validators, (n - 1) / 3 may fail.

`extraData` is RLP of [vanity (32 bytes), validators, vote (none), round (0), seals (none)]: the only place in which a
QBFT network names its first validators.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import rlp
from eth_utils.address import is_address, to_canonical_address, to_checksum_address

# Not known to any public network; another for each consortium keeps a transaction of one from being one of another.
CHAIN_ID = 1_981_042
# Says to Besu that the block is of a BFT network.
MIX_HASH = "0x63746963616c2062797a616e74696e65206661756c7420746f6c6572616e6365"
VALIDATORS_MIN = 4


def encode_extra_data(validators: Sequence[str]) -> str:
    """The genesis block's `extraData`, as hex."""
    addresses = [to_canonical_address(address) for address in validators]
    encoded: bytes = rlp.encode([bytes(32), addresses, [], b"", []])
    return "0x" + encoded.hex()


def decode_extra_data(data: str) -> list[str]:
    """The validators that an `extraData` names. Raises `ValueError` if it is none of a QBFT genesis."""
    vanity, validators, vote, round_id, seals = rlp.decode(bytes.fromhex(data.removeprefix("0x")))
    if len(vanity) != 32 or vote or round_id or seals:
        raise ValueError("not the extraData of a QBFT genesis block")
    return [to_checksum_address(address) for address in validators]


def make_genesis(validators: Sequence[str], *, chain_id: int = CHAIN_ID) -> dict[str, Any]:
    """The whole genesis file: free gas, blocks every 2 s, and no account with funds."""
    return {
        "config": {
            "chainId": chain_id,
            # the contract is compiled for paris, whose instructions are London's
            "londonBlock": 0,
            # after London a block has a base fee; 0 for good makes gas free
            "zeroBaseFee": True,
            "qbft": {"epochlength": 30_000, "blockperiodseconds": 2, "requesttimeoutseconds": 4},
        },
        "nonce": "0x0",
        "timestamp": "0x0",
        "extraData": encode_extra_data(validators),
        "gasLimit": "0x1c9c380",
        "difficulty": "0x1",
        "mixHash": MIX_HASH,
        "coinbase": "0x" + "0" * 40,
        "alloc": {},
    }


def main(addresses: Sequence[str]) -> int:
    """Print the genesis of these validators."""
    wrong = [address for address in addresses if not is_address(address)]
    if wrong or len({address.lower() for address in addresses}) < VALIDATORS_MIN:
        problem = f"{wrong[0]!r} is no address" if wrong else f"fewer than {VALIDATORS_MIN} validators"
        print(f"Error: {problem}\n  hint: name the validators' addresses, each once", file=sys.stderr)
        return 1
    print(json.dumps(make_genesis(addresses), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
