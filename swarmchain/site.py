"""A site at its desk: settings and key, the contract that knows it, its journal, and the outbox that both feed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from swarmchain.chain import SwarmContract
from swarmchain.config import SiteConfig, read_deployment
from swarmchain.journal import Journal
from swarmchain.keys import SealKey, Signer
from swarmchain.node import Node
from swarmchain.outbox import Outbox
from swarmchain.sealed import SealedStore
from swarmchain.store import Store


@dataclass(frozen=True)
class Site:
    """What a site acts with. The contract's calls go through the outbox, and so through the journal."""

    config: SiteConfig
    signer: Signer
    contract: SwarmContract
    journal: Journal
    outbox: Outbox
    index: int


def open_contract(config: SiteConfig) -> SwarmContract:
    """The consortium's contract, as the site's settings name it, to read from."""
    deployment = read_deployment(config.resolve(config.chain.deployment))
    node = Node(config.rpc_urls, timeout_s=config.chain.timeout_s, profile=config.chain.profile)
    return SwarmContract(node, deployment)


@contextlib.contextmanager
def open_site(config: SiteConfig, signer: Signer) -> Iterator[Site]:
    """The contract, and the journal of the site that signs with this key.

    Raises
    ------
    NotSite
        If the contract knows no site with this key.
    JournalError
        If the journal is another site's, or cannot be used.
    """
    contract = open_contract(config)
    index = contract.get_site_index(signer.address)
    journal = Journal(config.work_dir, chain_id=contract.chain_id, contract=contract.address, site=index)
    outbox = Outbox(contract.node, journal)
    contract.send = outbox.send
    with contextlib.closing(journal):
        yield Site(config, signer, contract, journal, outbox, index)


def find_seal_keys(contract: SwarmContract, run: int | None) -> frozenset[str]:
    """Public keys of the sites that may read what is put into a run from now on.

    Those that have joined it or are members of its newest round, unless the consortium has removed them; without a run
    all sites of the consortium: what they must see before they join.
    """
    sites = [site for site in contract.get_sites() if site.active and site.seal_key]
    if run is not None:
        view = contract.view_run(run)
        sites = [site for site in sites if site.site in view.joined | view.members]
    return frozenset(site.seal_key for site in sites)


def seal_store(store: Store, key: SealKey | None, contract: SwarmContract, run: int | None) -> Store:
    """A store that seals what it is given to those whom `find_seal_keys` finds at the chain's newest block.

    Without a key, `store` itself.
    """
    if key is None:
        return store
    known: dict[int, frozenset[str]] = {}

    def find_members() -> frozenset[str]:
        head = contract.node.read_head()
        if head not in known:
            known.clear()
            known[head] = find_seal_keys(contract, run)
        return known[head]

    return SealedStore(store, key, context=f"{contract.chain_id}-{contract.address.lower()}", members=find_members)


def publish_seal_key(site: Site, key: SealKey) -> bool:
    """Put the site's public key on chain, unless it is there; whether it had to be."""
    if site.contract.get_sites()[site.index].seal_key == key.public:
        return False
    site.contract.set_seal_key(site.signer, key.public)
    return True
