"""What stands in deploy/ and mkdocs.yml: files that other programs read, checked as far as runs without them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, make_signers
from eth_utils.address import is_address, to_checksum_address

from swarmchain.chain import SwarmContract, deploy_contract
from swarmchain.devchain import start_devchain
from swarmchain.node import Node, load_artifact
from swarmchain.protocol import Terms

BESU = ROOT / "deploy" / "besu"
sys.path.insert(0, str(BESU))

from genesis import decode_extra_data, encode_extra_data, main, make_genesis  # noqa: E402

EXAMPLES = [to_checksum_address("0x" + hashlib.sha256(f"swarmchain example validator {i}".encode()).hexdigest()[:40])
            for i in range(1, 5)]
# of Besu's reference of command line options; each is a key of the configuration file
BESU_OPTIONS = {
    "data-path", "genesis-file", "min-gas-price", "tx-pool", "tx-pool-limit-by-account-percentage", "p2p-host",
    "p2p-port", "discovery-enabled", "static-nodes-file", "permissions-nodes-config-file-enabled",
    "permissions-nodes-config-file", "permissions-accounts-config-file-enabled", "permissions-accounts-config-file",
    "rpc-http-enabled", "rpc-http-host", "rpc-http-port", "rpc-http-api", "host-allowlist", "rpc-max-logs-range",
    "sync-mode", "data-storage-format", "logging",
}
# of Besu's reference of genesis items
GENESIS_ITEMS = {"config", "nonce", "timestamp", "extraData", "gasLimit", "difficulty", "mixHash", "coinbase", "alloc"}
QBFT_ITEMS = {"epochlength", "blockperiodseconds", "requesttimeoutseconds"}
# instructions younger than London: PUSH0; TLOAD, TSTORE, MCOPY, BLOBHASH, BLOBBASEFEE
YOUNGER = {0x5F, 0x5C, 0x5D, 0x5E, 0x49, 0x4A}
ENODE = re.compile(r"enode://[0-9a-f]{128}@[\d.]+:\d+")


def test_genesis_is_what_the_script_writes_for_its_validators() -> None:
    found = json.loads((BESU / "genesis.json").read_text())
    assert found == make_genesis(EXAMPLES)
    assert set(found) == GENESIS_ITEMS and set(found["config"]["qbft"]) == QBFT_ITEMS
    assert found["config"]["zeroBaseFee"] is True and found["alloc"] == {}
    assert decode_extra_data(found["extraData"]) == EXAMPLES


def test_extra_data_is_that_of_besus_own_documentation() -> None:
    """Besu's guide to QBFT prints four validators and the extraData that they give."""
    validators = ["0x64a702e6263b7297a96638cac6ae65e6541f4169", "0x943923390ad55e90c237593b3b0e401f3b08a031",
                  "0x8aefdb9a738c9f433e5b6b212a6d62f6370c2f69", "0xc7eeb9a4e00ce683cf93039b212648e01c6c6b78"]
    known = ("0xf87aa00000000000000000000000000000000000000000000000000000000000000000f8549464a702e6263b7297a96638cac6"
             "ae65e6541f416994943923390ad55e90c237593b3b0e401f3b08a031948aefdb9a738c9f433e5b6b212a6d62f6370c2f6994c7eeb9a4"
             "e00ce683cf93039b212648e01c6c6b78c080c0")
    assert encode_extra_data(validators) == known


@pytest.mark.parametrize(("addresses", "words"), [
    (EXAMPLES[:3], "fewer than 4 validators"), ([*EXAMPLES[:3], EXAMPLES[0]], "fewer than 4 validators"),
    ([*EXAMPLES, "0x12"], "'0x12' is no address"),
])
def test_invalid_validators(addresses: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(addresses) == 1
    assert words in capsys.readouterr().err


def test_node_configuration_has_known_keys_and_fits_its_files() -> None:
    found = tomllib.loads((BESU / "validator.toml").read_text())
    assert set(found) <= BESU_OPTIONS
    assert (found["min-gas-price"], found["tx-pool"], found["rpc-http-host"]) == (0, "sequenced", "127.0.0.1")
    assert not {"ADMIN", "DEBUG", "PERM"} & set(found["rpc-http-api"])
    permissions = tomllib.loads((BESU / "permissions.toml").read_text())
    assert set(permissions) == {"nodes-allowlist", "accounts-allowlist"}
    assert all(ENODE.fullmatch(node) for node in permissions["nodes-allowlist"])
    assert all(is_address(account) for account in permissions["accounts-allowlist"])
    assert json.loads((BESU / "static-nodes.json").read_text()) == permissions["nodes-allowlist"]
    services = yaml.safe_load((BESU / "docker-compose.yml").read_text())["services"]
    hosts = {service["networks"]["chain"]["ipv4_address"] for service in services.values()}
    assert hosts == {node.split("@")[1].split(":")[0] for node in permissions["nodes-allowlist"]}
    options = {word.split("=")[0].removeprefix("--") for s in services.values() for word in s["command"]}
    assert options <= BESU_OPTIONS | {"config-file"}


def test_contract_needs_nothing_younger_than_the_genesis_fork() -> None:
    """Its instructions are London's, and it works on an EVM of that fork whose gas is free."""
    for kind in ("bytecode", "runtime"):
        code, at, used = bytes.fromhex(load_artifact()[kind].removeprefix("0x")), 0, set()
        while at < len(code):
            used.add(code[at])
            at += 1 + (code[at] - 0x5F if 0x60 <= code[at] <= 0x7F else 0)
        assert not used & YOUNGER
    options = ["--hardfork", "london"]
    with start_devchain("anvil", options=options) as chain:
        signers = make_signers(4)
        node = Node(chain.rpc_url, profile="besu-qbft")
        deployment = deploy_contract(node, signers[0], [(s.address, f"Site {i}") for i, s in enumerate(signers)])
        contract = SwarmContract(node, deployment)
        run = contract.propose_run(signers[0], spec="ab" * 32, terms=Terms(60, 60, 2))
        assert contract.join_run(signers[1], run) > 0
        assert node.read_fees() == {"gasPrice": 0}


def test_nothing_in_deploy_is_a_secret() -> None:
    for path in (p for p in (ROOT / "deploy").rglob("*") if p.is_file() and p.suffix not in (".pyc", ".js")):
        text = path.read_text()
        assert not re.search(r"PRIVATE KEY|\"crypto\"", text), path
        # 32 bytes in hex that stand alone would be a key; the words of QBFT's mixHash and empty extraData are known
        found = set(re.findall(r"(?<![0-9a-f])(?:0x)?([0-9a-f]{64})(?![0-9a-f])", text))
        assert found <= {"63746963616c2062797a616e74696e65206661756c7420746f6c6572616e6365"}, path


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_unit_file_is_one(tmp_path: Path) -> None:
    text = (ROOT / "deploy" / "swarmchain-agent.service").read_text()
    unit = tmp_path / "swarmchain-agent.service"
    unit.write_text(text.replace("/opt/swarmchain/bin/swarmchain", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "RestartPreventExitStatus=1 2 4 5" in text and "Restart=on-failure" in text
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "LoadCredential=password:"):
        assert line in text


class Links(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in ("script", "img", "iframe"):
            self.fetched.append(named.get("src") or "")
        if tag == "link" and named.get("rel") != "canonical":
            self.fetched.append(named.get("href") or "")


def test_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    """Every link of every page leads somewhere, anchors too, and a reader's browser asks nobody else."""
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", tmp_path / "site"],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    names = {str(page.relative_to(tmp_path / "site")) for page in pages}
    assert {"index.html", "cli.html", "roles/it.html", "repository/ARCHITECTURE.html"} <= names
    for page in pages:
        links = Links()
        links.feed(page.read_text())
        assert not [link for link in links.fetched if "//" in link and not link.startswith("data:")], page


def test_anchors_in_the_repository_lead_somewhere() -> None:
    """Links with anchors, in every page of the repository, as the code host shows them."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")]
    for page in pages:
        for target, anchor in re.findall(r"\]\(([^)\s#:]*)#([^)\s]+)\)", page.read_text()):
            other = (page.parent / target) if target else page
            headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page}: {target}#{anchor}"
