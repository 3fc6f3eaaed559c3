"""Everything that can go wrong in an expected way, as one tree.

    SwarmError                      exit code 1: something the user can mend
    ├── ConfigError                 site.toml or an option
    ├── KeystoreError               key file or password
    ├── SpecError                   a run's law is malformed, or this site cannot satisfy it
    ├── DataError                   this site's data
    ├── CheckpointError             bytes that are no checkpoint or contribution of this run
    ├── OpeningError                an opening that is malformed or does not fit its commitment
    ├── MergeMismatch               exit code 5: a round's checkpoint is not what its contributions give
    ├── ReplayError                 a contract's events do not give a state
    ├── AuditFailed                 a run's proof is broken
    ├── RunFailed                   exit code 4: a run ended without reaching its goal
    ├── StoreError                  the store refused: read-only, full, blob missing or altered
    ├── JournalError                the site's own memory of its promises
    ├── DevchainError               a dev chain could not be started
    ├── ChainError                  the chain answered, but not as our contract would
    │   ├── ChainMismatch           another chain or contract than the deployment's
    │   ├── NonceTaken              another transaction of this key was faster
    │   └── ContractError           a refusal by the contract: one class for each Solidity error
    └── Unreachable                 exit code 3: a supervisor may retry
        ├── ChainUnreachable
        ├── SendingBusy             another process of this site is sending a transaction
        └── StoreUnreachable
            └── StoreFull           no room: freeing some helps

An error is one line that names what is wrong, and a hint that says what to do. The command line prints both and no
traceback; whatever is not in this tree keeps its traceback.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SwarmError(Exception):
    """An expected failure.

    Parameters
    ----------
    message
        One line naming what is wrong.
    hint
        One line saying what to do about it.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(SwarmError):
    """site.toml or an option is not usable."""


class KeystoreError(SwarmError):
    """A key file or its password is not usable."""


class SpecError(SwarmError):
    """A run's spec is malformed, or this site cannot satisfy it."""


class DataError(SwarmError):
    """The site's data do not hold what the run needs."""


class CheckpointError(SwarmError):
    """Bytes that are no checkpoint or contribution of this run."""


class OpeningError(SwarmError):
    """An opening that is malformed or does not fit its commitment."""


class MergeMismatch(SwarmError):
    """A majority accepted a checkpoint that its own manifest's contributions do not give."""

    exit_code: ClassVar[int] = 5


class ReplayError(SwarmError):
    """The events that a node shows are against the contract's rules, or not all there."""


class AuditFailed(SwarmError):
    """Something that a run's proof stands on is not what it was."""


class RunFailed(SwarmError):
    """A run rests after too many failures in a row, or ended without a checkpoint."""

    exit_code: ClassVar[int] = 4


class StoreError(SwarmError):
    """The store refused, or holds something else than it should."""


class BlobMissing(StoreError):
    """The store does not hold this blob (yet)."""


class NotRecipient(StoreError):
    """A sealed blob is not sealed to this key (yet)."""


class JournalError(SwarmError):
    """The journal belongs to another site or contract, or cannot be written."""


class DevchainError(SwarmError):
    """A dev chain could not be started."""


class ChainError(SwarmError):
    """The chain answered, but not as our contract would."""


class ChainMismatch(ChainError):
    """The node is on another chain, or another code lies at the contract's address."""


class NonceTaken(ChainError):
    """Another transaction with the same key and nonce was faster."""


class Unreachable(SwarmError):
    """A service did not answer; trying again later may help."""

    exit_code: ClassVar[int] = 3


class ChainUnreachable(Unreachable):
    """No Ethereum node answers at the RPC URL."""


class SendingBusy(Unreachable):
    """Another process of this site holds the right to send."""


class StoreUnreachable(Unreachable):
    """The shared store does not answer."""


class StoreFull(StoreUnreachable):
    """The shared store has no room left."""


class ContractError(ChainError):
    """A refusal by the contract.

    Subclasses carry the Solidity error's name and say it in words; `values` holds its arguments by their Solidity
    names.
    """

    words: ClassVar[str] = ""
    remedy: ClassVar[str] = ""

    def __init__(self, **values: Any) -> None:
        super().__init__(self.words.format(**values), hint=self.remedy)
        self.values = values


class NoFounders(ContractError):
    """See ISwarm.sol."""

    words = "a consortium needs at least one founding site"
    remedy = "name the sites with --site"


class TooManySites(ContractError):
    """See ISwarm.sol."""

    words = "{sites} sites are more than the {sitesMax} that one contract holds"


class InvalidSite(ContractError):
    """See ISwarm.sol."""

    words = "the key {key} or the name of site {site} is empty or malformed"


class SiteExists(ContractError):
    """See ISwarm.sol."""

    words = "{key} is already site {site}"
    remedy = "give every site a key of its own"


class NotSite(ContractError):
    """See ISwarm.sol."""

    words = "{caller} is no site of this consortium"
    remedy = "check the keystore, and that the deployment lists this address"


class UnknownSite(ContractError):
    """See ISwarm.sol."""

    words = "there is no site {site}: the consortium has {sites}, counted from 0"


class UnknownProposal(ContractError):
    """See ISwarm.sol."""

    words = "there is no proposal {proposal}: the contract holds {proposals}, counted from 1"


class ProposalExpired(ContractError):
    """See ISwarm.sol."""

    words = "proposal {proposal} had until {deadline} (seconds since 1970) to find a majority"
    remedy = "propose it again"


class ProposalExecuted(ContractError):
    """See ISwarm.sol."""

    words = "proposal {proposal} ({kind}) has already been carried out"


class SitesNeeded(ContractError):
    """See ISwarm.sol."""

    words = "{remaining} sites would remain, and an open run (or the consortium) needs {needed}"
    remedy = "admit a site first, or leave the runs that need them all"


class InvalidSuccessor(ContractError):
    """See ISwarm.sol."""

    words = "no contract lies at {successor}"
    remedy = "deploy the successor first"


class Retired(ContractError):
    """See ISwarm.sol."""

    words = "the consortium has moved to the contract {successor}"
    remedy = "use the deployment file of the new contract"


class UnknownRun(ContractError):
    """See ISwarm.sol."""

    words = "there is no run {run}: the contract holds {runs}, counted from 1"
    remedy = "`swarmchain run list` shows the runs"


class EmptyDigest(ContractError):
    """See ISwarm.sol."""

    words = "an empty digest was given for run {run}, round {round}"


class WindowOutOfRange(ContractError):
    """See ISwarm.sol."""

    words = "a window of {windowS} s is not within 1 and {windowMaxS} s"


class SitesMinOutOfRange(ContractError):
    """See ISwarm.sol."""

    words = "sites_min {sitesMin} is not within 1 and the {sites} sites of this consortium"


class QuorumOutOfRange(ContractError):
    """See ISwarm.sol."""

    words = "a quorum of {quorumBps} in 10,000 is more than {quorumBpsMax}"


class AlreadyJoined(ContractError):
    """See ISwarm.sol."""

    words = "site {site} has already joined run {run}"


class NotJoined(ContractError):
    """See ISwarm.sol."""

    words = "site {site} has not joined run {run}"
    remedy = "`swarmchain run join` gives this site's consent"


class TooFewSites(ContractError):
    """See ISwarm.sol."""

    words = "{joined} sites have joined, the run needs {sitesMin}"
    remedy = "wait until more sites have joined"


class WrongRound(ContractError):
    """See ISwarm.sol."""

    words = "round {round} is not the newest round, which is {current}"


class WrongPhase(ContractError):
    """See ISwarm.sol."""

    words = "the round is in phase {phase}, the call needs phase {needed}"


class NotMember(ContractError):
    """See ISwarm.sol."""

    words = "site {site} is no member of round {round}: it joined after the round had opened"
    remedy = "it takes part from the next round on"


class AlreadyCommitted(ContractError):
    """See ISwarm.sol."""

    words = "site {site} has already committed in round {round}"


class ScoreOutOfRange(ContractError):
    """See ISwarm.sol."""

    words = "a score of {scoreBps} in 10,000 is more than {scoreBpsMax}"


CONTRACT_ERRORS: dict[str, type[ContractError]] = {cls.__name__: cls for cls in ContractError.__subclasses__()}
