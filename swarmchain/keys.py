"""The only room that sees a private key.

A key lies in an encrypted Ethereum keystore (Web3 Secret Storage, scrypt), readable by its owner only. In memory it
lives inside a `Signer`, which signs, derives salts, and shows nothing but its address. What is sealed to the site is
opened by a second key, X25519, which lies beside it under the same password and lives inside a `SealKey`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from swarmchain.config import SiteConfig, write_file
from swarmchain.errors import KeystoreError
from swarmchain.protocol import Digest, RoundKey, Strict, first_problem
from swarmchain.sealing import Envelope, derive_content_key, open_box

# eth_account takes a third of a second to import, so whoever only asks for help must not wait for it
if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

PASSWORD_VARIABLE = "SWARMCHAIN_PASSWORD"  # noqa: S105 - the variable's name, not a password


class Signer:
    """A site's key in use."""

    def __init__(self, account: LocalAccount) -> None:
        self._account = account
        self.address: str = account.address

    def __repr__(self) -> str:
        return f"Signer({self.address})"

    def sign_transaction(self, transaction: dict[str, Any]) -> bytes:
        """Signed bytes of a transaction, ready to send."""
        return bytes(self._account.sign_transaction(transaction).raw_transaction)

    def derive_salt(self, key: RoundKey, digest: str) -> str:
        """The salt of one commitment: HMAC-SHA256 under the private key, over round and digest.

        Nobody without the key can guess it, and a site that lost its journal derives the same one again.
        """
        message = json.dumps(
            ["swarmchain.salt.v1", key.chain_id, key.contract.lower(), key.run, key.round_id, digest]
        ).encode()
        return hmac.new(bytes(self._account.key), message, hashlib.sha256).hexdigest()


class SealKey:
    """A site's (or an auditor's) X25519 key in use: it opens what is sealed to it."""

    def __init__(self, secret: bytes) -> None:
        from nacl.bindings import crypto_scalarmult_base

        self._secret = secret
        self.public: str = crypto_scalarmult_base(secret).hex()

    def __repr__(self) -> str:
        return f"SealKey({self.public})"

    def open_box(self, envelope: Envelope) -> bytes:
        """The content key of a sealed blob. Raises `NotRecipient`."""
        return open_box(envelope, self.public, self._secret)

    def derive_content_key(self, context: str, digest: str) -> bytes:
        """The content key of a blob that this site seals; `context` names the contract."""
        return derive_content_key(self._secret, context, digest)

    def open_sealed(self, data: bytes) -> bytes:
        """What somebody put into a sealed box (libsodium's) for this key. Raises `KeystoreError`."""
        from nacl.bindings import crypto_box_seal_open
        from nacl.exceptions import CryptoError

        try:
            return bytes(crypto_box_seal_open(data, bytes.fromhex(self.public), self._secret))
        except (CryptoError, TypeError, ValueError) as exc:
            raise KeystoreError("this is not sealed to the key " + self.public[:12] + "…",
                                hint="ask for it again, and name this key") from exc


class _SealFile(Strict):
    """The file of an X25519 key: its secret in a SecretBox (XSalsa20-Poly1305) under Argon2id of the password."""

    format: Literal["swarmchain-seal-key/1"] = "swarmchain-seal-key/1"
    public: Digest
    opslimit: Annotated[int, Field(ge=1, le=16)]
    memlimit: Annotated[int, Field(ge=1 << 13, le=1 << 30)]
    salt: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    box: Annotated[str, Field(pattern=r"^[0-9a-f]{144}$")]


def create_seal_key(path: Path, password: str, *, secret: bytes | None = None, is_cheap: bool = False) -> str:
    """Create an X25519 key, or take `secret` (32 bytes), and write it encrypted; return the public key as hex.

    `is_cheap` is for throw-away keys: a password that is guessed quickly.

    Raises
    ------
    KeystoreError
        If the file exists already, or the password is empty.
    """
    _check_new(path, password)
    from nacl import pwhash, utils
    from nacl import secret as boxes

    secret, salt = secret or utils.random(32), utils.random(pwhash.argon2id.SALTBYTES)
    ops, mem = (1, 1 << 13) if is_cheap else (pwhash.argon2id.OPSLIMIT_MODERATE, pwhash.argon2id.MEMLIMIT_MODERATE)
    under = pwhash.argon2id.kdf(32, password.encode(), salt, opslimit=ops, memlimit=mem)
    public = SealKey(secret).public
    found = _SealFile(public=public, opslimit=ops, memlimit=mem, salt=salt.hex(),
                      box=bytes(boxes.SecretBox(under).encrypt(secret)).hex())
    write_file(path, found.model_dump_json().encode() + b"\n", mode=0o600)
    return public


def read_seal_public(path: Path) -> str:
    """The public part of an X25519 key's file, without its password. Raises `KeystoreError`."""
    return _read_seal_file(path).public


def open_seal_key(path: Path, password: str) -> SealKey:
    """Decrypt an X25519 key.

    Raises
    ------
    KeystoreError
        If the file is missing, none, readable by others, or the password is wrong.
    """
    found = _read_seal_file(path)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise KeystoreError(f"{path} is readable by others", hint=f"chmod 600 {path}")
    from nacl import pwhash
    from nacl import secret as boxes
    from nacl.exceptions import CryptoError

    under = pwhash.argon2id.kdf(32, password.encode(), bytes.fromhex(found.salt), opslimit=found.opslimit,
                                memlimit=found.memlimit)
    try:
        key = SealKey(bytes(boxes.SecretBox(under).decrypt(bytes.fromhex(found.box))))
    except CryptoError as exc:
        raise KeystoreError(f"wrong password for {path}", hint="check the password file or prompt") from exc
    if key.public != found.public:
        raise KeystoreError(f"{path} holds another key than it says", hint="restore it from your backup")
    return key


def create_keystore(path: Path, password: str, *, secret: bytes | None = None, work_log2: int = 18) -> str:
    """Create a key, or take `secret` (32 bytes), and write it encrypted; return its address.

    `work_log2` is scrypt's cost: 18 is the standard's.

    Raises
    ------
    KeystoreError
        If the file exists already, or the password is empty.
    """
    _check_new(path, password)
    from eth_account import Account

    account = Account.from_key(secret) if secret is not None else Account.create()
    encrypted = Account.encrypt(account.key, password, kdf="scrypt", iterations=1 << work_log2)
    write_file(path, json.dumps(encrypted).encode(), mode=0o600)
    return str(account.address)


def read_address(path: Path) -> str:
    """The address of a keystore, without its password. Raises `KeystoreError` as `open_keystore` does."""
    return _checksum(_read_keystore(path)["address"])


def open_keystore(path: Path, password: str) -> Signer:
    """Decrypt a keystore.

    Raises
    ------
    KeystoreError
        If the file is missing, no keystore, readable by others, or the password is wrong.
    """
    keystore = _read_keystore(path)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise KeystoreError(f"{path} is readable by others", hint=f"chmod 600 {path}")
    from eth_account import Account

    try:
        return Signer(Account.from_key(Account.decrypt(keystore, password)))
    except (ValueError, KeyError, TypeError, NotImplementedError) as exc:
        if "MAC mismatch" in str(exc):
            raise KeystoreError(f"wrong password for {path}", hint="check the password file or prompt") from exc
        raise KeystoreError(f"{path} is no keystore: {exc}", hint="restore it from your backup") from exc


@contextlib.contextmanager
def lock_keystore(path: Path) -> Iterator[None]:
    """Be the only agent with this key, on this machine, while the context lasts; the lock dies with the process.

    Raises
    ------
    KeystoreError
        If another agent has it.
    """
    with path.open("rb") as file:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise KeystoreError(
                f"another agent is at work with the key {path}", hint="one key, one agent: stop the other one first"
            ) from exc
        yield


def find_password(config: SiteConfig) -> str | None:
    """The keystore password from `SWARMCHAIN_PASSWORD` or the password file; None if neither is given.

    Raises
    ------
    KeystoreError
        If the password file cannot be read.
    """
    if PASSWORD_VARIABLE in os.environ:
        return os.environ[PASSWORD_VARIABLE]
    if config.keys.password_file is None:
        return None
    return read_password_file(config.resolve(config.keys.password_file))


def read_password_file(path: Path) -> str:
    """First line of a password file, without its line end. Raises `KeystoreError` if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise KeystoreError(f"cannot read the password file {path}", hint="check the path and its mode") from exc
    if not lines or not lines[0]:
        raise KeystoreError(f"the password file {path} is empty", hint="put the password on its first line")
    return lines[0]


def read_checksum_address(text: str) -> str:
    """An address that a person typed, with its checksum. Raises `KeystoreError` if a digit is wrong or missing."""
    from eth_utils.address import is_address, to_checksum_address

    if not text.startswith("0x") or not is_address(text):
        raise KeystoreError(f"{text!r} is no address, or its checksum is wrong", hint="copy it from the site's card")
    return str(to_checksum_address(text))


def _read_seal_file(path: Path) -> _SealFile:
    try:
        return _SealFile.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise KeystoreError(f"cannot read the seal key {path}: {exc.strerror}", hint="restore your backup") from exc
    except ValidationError as exc:
        raise KeystoreError(f"{path} is no seal key: {first_problem(exc)}", hint="restore it from your backup") from exc


def _read_keystore(path: Path) -> dict[str, Any]:
    hint = "`swarmchain site init` creates one; or restore your backup"
    try:
        keystore = json.loads(path.read_bytes())
    except OSError as exc:
        raise KeystoreError(f"cannot read the keystore {path}: {exc.strerror}", hint=hint) from exc
    except ValueError as exc:
        raise KeystoreError(f"{path} is no keystore: not JSON", hint=hint) from exc
    if not isinstance(keystore, dict) or not isinstance(keystore.get("address"), str) or "crypto" not in keystore:
        raise KeystoreError(f"{path} is no keystore", hint=hint)
    return keystore


def _checksum(address: str) -> str:
    from eth_utils.address import to_checksum_address

    try:
        return str(to_checksum_address(address if address.startswith("0x") else "0x" + address))
    except ValueError as exc:
        raise KeystoreError(f"a keystore holds the bad address {address!r}") from exc


def _check_new(path: Path, password: str) -> None:
    if path.exists():
        raise KeystoreError(f"{path} exists already", hint="a key is never overwritten: move it, or use another name")
    if not password:
        raise KeystoreError("the keystore password is empty", hint="choose one")
