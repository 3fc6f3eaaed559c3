"""A site's transactions: one at a time, each signed and written down before it is sent, and sent until a block has it.

The nonce belongs to the journal. A transaction that is not seen in a block is sent again, the same bytes, and a fee
that became too low is raised under the same nonce; so whatever is lost on the way, and however often this process dies,
no promise is made twice. Success is what the contract shows, so "already known" and "nonce too low" are no errors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from swarmchain.errors import ChainError, ChainUnreachable, ContractError, NonceTaken
from swarmchain.journal import Journal, Promised
from swarmchain.keys import Signer
from swarmchain.node import Node, stalled

TRIES_MAX = 20
RAISE_FEE_AFTER_S = 60.0
# Nodes take a replacement only if it pays at least a tenth more (geth, Anvil and Besu agree on that).
FEE_RAISE = 1.125


class Outbox:
    """Sends the transactions of one key.

    Parameters
    ----------
    now
        Seconds since 1970, to know how long a transaction has been waiting.
    """

    def __init__(self, node: Node, journal: Journal, *, now: Callable[[], float] = time.time) -> None:
        self.node = node
        self.journal = journal
        self._now = now

    def send(self, signer: Signer, call: Mapping[str, Any], *, gas: int, purpose: str) -> Any:
        """Send one transaction after all earlier ones, and return its receipt.

        Raises
        ------
        ChainUnreachable
            If no node answers, or no block takes it in for now. It stays promised: `settle` sends it again.
        JournalError
            If it cannot be written down; then it is not sent.
        ChainError
            If the chain refuses it at once; then it is forgotten.
        """
        with self.journal.lock_sending(timeout_s=2 * self.node.profile.receipt_timeout_s):
            self._settle(signer)
            try:
                for attempt in Retrying(retry=retry_if_exception_type(NonceTaken), stop=stop_after_attempt(TRIES_MAX),
                                        wait=wait_fixed(0.05), reraise=True):
                    with attempt:
                        promised = self._promise(signer, call, gas=gas, purpose=purpose)
            except NonceTaken as exc:
                raise ChainUnreachable(
                    f"cannot send {purpose}: another transaction of this key waits under the same nonce",
                    hint="does a process without this journal use the key?",
                ) from exc
            return self._await(promised)

    def settle(self, signer: Signer) -> None:
        """See to it that every promised transaction is in a block.

        Raises
        ------
        ChainUnreachable, ChainError
            If one is not, for now.
        """
        if self.journal.get_pending(signer.address):
            with self.journal.lock_sending(timeout_s=2 * self.node.profile.receipt_timeout_s):
                self._settle(signer)

    def _settle(self, signer: Signer) -> None:
        pending = self.journal.get_pending(signer.address)
        if not pending:
            return
        nonce = self.node.get_nonce(signer.address)
        self.journal.settle_nonce(signer.address, nonce - 1)
        # a chain that lost blocks wants the earlier ones again, or it never takes in the later ones
        recent = self.journal.get_recent(signer.address, from_nonce=nonce)
        if recent and recent[0].nonce > nonce:
            # one in between was not ours to send again: the contract shows what is missing, and it is done anew
            for promised in recent:
                self.journal.forget_transaction(promised.digest)
            return
        newest = {promised.nonce: promised for promised in recent}  # of several of one nonce, the last pays most
        for promised in newest.values():
            self._send_again(signer, promised)

    def _send_again(self, signer: Signer, promised: Promised) -> None:
        refusal: ChainError | None = None
        try:
            self.node.broadcast(promised.raw)
        except NonceTaken:
            pass  # known or in a block: that is what we want
        except ContractError:
            pass  # Hardhat tells a revert at once, and puts the transaction into a block all the same
        except ChainError as exc:
            refusal = exc
        if self.node.get_receipt(promised.digest) is None:
            is_stuck = refusal is not None or self._now() - promised.sent_at >= RAISE_FEE_AFTER_S
            if is_stuck and "maxFeePerGas" in promised.fees:
                promised = self._raise_fee(signer, promised)
            elif refusal is not None:
                raise refusal
        self._await(promised)

    def _raise_fee(self, signer: Signer, promised: Promised) -> Promised:
        present = self.node.read_fees()
        fees = {name: max(int(value * FEE_RAISE) + 1, present.get(name, 0)) for name, value in promised.fees.items()}
        raised = self._sign(signer, promised.call, gas=promised.gas, purpose=promised.purpose, nonce=promised.nonce,
                            fees=fees)
        try:
            self._broadcast(raised)
        except NonceTaken:
            return promised
        return raised

    def _promise(self, signer: Signer, call: Mapping[str, Any], *, gas: int, purpose: str) -> Promised:
        """Sign, write down, send. Raises `NonceTaken` if a process without this journal used the nonce."""
        nonce = self.node.get_nonce(signer.address)
        fees = self.node.read_fees()
        promised = self._sign(signer, dict(call), gas=gas, purpose=purpose, nonce=nonce, fees=fees)
        try:
            self._broadcast(promised)
        except NonceTaken:
            # ours all the same if a node has it
            if self.node.get_receipt(promised.digest) is None and not self.node.knows(promised.digest):
                self.journal.forget_transaction(promised.digest)
                raise
        return promised

    def _sign(self, signer: Signer, call: dict[str, str], *, gas: int, purpose: str, nonce: int, fees: dict[str, int]
              ) -> Promised:
        """Sign and write down."""
        signed = self.node.sign(signer, call, gas=gas, nonce=nonce, fees=fees)
        promised = Promised(signer.address, nonce, signed.digest, purpose, signed.raw, call, gas, fees, self._now())
        self.journal.record_transaction(promised)
        return promised

    def _broadcast(self, promised: Promised) -> None:
        try:
            self.node.broadcast(promised.raw)
        except (NonceTaken, ContractError):
            raise
        except ChainError:
            # refused for good, as by a node that wants more gas or funds: nothing was promised to anyone
            self.journal.forget_transaction(promised.digest)
            raise

    def _await(self, promised: Promised) -> Any:
        receipt = self.node.await_receipt(promised.digest)
        if receipt is None:
            if self.node.get_nonce(promised.address) > promised.nonce:
                self.journal.settle_nonce(promised.address, promised.nonce)
                raise ChainUnreachable(f"another transaction than {promised.purpose} took its place",
                                       hint="the agent looks again; does another process use this key?")
            raise stalled(promised.purpose, promised.digest)
        return self._conclude(promised, receipt)

    def _conclude(self, promised: Promised, receipt: Any) -> Any:
        self.journal.settle_nonce(promised.address, promised.nonce)
        return receipt
