"""The text of an annotated site.toml, as `swarmchain site init` writes it."""

from __future__ import annotations

import json

SITE_TOML = """\
# A site's own settings. Nothing in this file is shared. Relative paths are relative to this file.

# as the other sites know it, at most 32 bytes
name = {name}

[chain]
# Ethereum nodes of the consortium's chain; the first that is healthy is asked
# (SWARMCHAIN_RPC_URL in the environment wins)
rpc_urls = [{rpc_url}]
# written by `swarmchain deploy`; ask the site that deployed
deployment = {deployment}
# "anvil", "hardhat", "besu-qbft", or "auto" (told from what the node calls itself)
profile = "auto"
# how long to wait for one answer of a node, in seconds
timeout_s = 10.0

[store]
# a folder that all sites see, or an fsspec URL such as s3://bucket/prefix
url = {store}
# credentials and endpoint, never in this file: a TOML file of mode 600, or a profile of the AWS files, or
# AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL in the environment; see docs/store.md
# options_file = "store.toml"
# profile = "swarm"
# rounds of each run that `swarmchain store prune` leaves; without it everything stays
# keep_rounds = 20

[keys]
# encrypted; who has it and its password signs for the site
keystore = {keystore}
# under the same password: opens what is sealed to the site, and seals its contributions; without it nothing is sealed
{seal_line}
# else SWARMCHAIN_PASSWORD in the environment, or a prompt
{password_line}

{data_section}[agent]
# journal and own contributions
work_dir = "work"
# longest pause between two looks at the chain, in seconds
poll_s = {poll_s}
# how long the next site waits before it opens a round in another's place, in seconds
stagger_s = {stagger_s}
# CPU threads for training; keep it fixed, results depend on it
threads = 1
# how often a long local training is written down, to go on from there after a restart, in seconds
resume_s = 30.0
# where /healthz and Prometheus' /metrics are answered (SWARMCHAIN_METRICS in the environment wins); off without it
# metrics = "127.0.0.1:9464"
"""


DATA_TOML = """\
# leave this section out where only rehearsals run
[data]
# .h5ad, .zarr, .fcs or a folder of them, a 10x folder or .h5, a .csv or .tsv table; it never leaves the site
path = {data}
# the column of .obs (or of `labels`) that holds the cell type, or the label of its donor
label_column = {label_column}
# for runs on donors: the column that says whose a cell is (of FCS files each is a donor where none is named), and the
# one that tells a donor's samples apart
{donor_line}
{sample_line}
# a table of labels where the file has none; its first column (or labels_key) names the cell, or the FCS file
{labels_line}
# what X holds: "counts", "log1p", "arcsinh", "intensities" (cytometry as measured), "proportions", "none" (as it is),
# or "auto" (told from the numbers)
state = {state}
# use this layer in place of X; "raw" is .raw
# layer = "counts"
# the feature that holds a row's total, where proportions are made of counts
# total_column = "total"
# FCS: apply $SPILLOVER: true (it must be there), false, or "auto" (where it is there)
# compensate = "auto"
# take names of features from this column of .var in place of .var_names
# feature_column = "gene_ids"
# translate them to "symbol" or "ensembl"; "auto" takes the run's kind
# features = "auto"
# by this table with the columns ensembl, symbol
# feature_table = "genes.csv"
# a table label, shared (the run's label), ontology (its Cell Ontology id, may be empty)
# label_file = "labels-map.csv"
# labels that are not on the run's list: "refuse", or "exclude" those cells
# unmapped = "refuse"
# fewest kinds of cells that a run may find here
{classes_line}

# keep the cells whose columns hold these values
# [data.where]
# "sample" = "S01"

# this site's feature = the run's feature
# [data.aliases]
# "CD3e" = "CD3"

# this site's label = the run's label; "" leaves those cells out
[data.label_map]
{label_map}
"""


def render_site_toml(
    *,
    name: str,
    rpc_url: str,
    deployment: str,
    store: str,
    data: str | None = None,
    label_column: str = "",
    labels: str | None = None,
    donor_column: str | None = None,
    sample_column: str | None = None,
    classes_min: int = 2,
    keystore: str = "keystore.json",
    seal_key: str | None = None,
    password_file: str | None = None,
    label_map: dict[str, str] | None = None,
    state: str = "auto",
    poll_s: float = 0.5,
    stagger_s: float = 2.0,
) -> str:
    """Text of an annotated site.toml, without [data] where none are named. JSON strings are valid TOML strings."""
    quote = json.dumps
    password = f"password_file = {quote(password_file)}" if password_file else (
        '# password_file = "password.txt"'
    )
    seal = f"seal_key = {quote(seal_key)}" if seal_key else '# seal_key = "seal-key.json"'
    lines = "".join(f"{quote(k)} = {quote(v)}\n" for k, v in (label_map or {}).items())
    section = "" if data is None else DATA_TOML.format(
        data=quote(data), label_column=quote(label_column), state=quote(state), label_map=lines,
        labels_line=f"labels = {quote(labels)}" if labels else '# labels = "labels.csv"',
        donor_line=f"donor_column = {quote(donor_column)}" if donor_column else '# donor_column = "donor"',
        sample_line=f"sample_column = {quote(sample_column)}" if sample_column else '# sample_column = "sample"',
        classes_line="# classes_min = 2" if classes_min == 2 else f"classes_min = {classes_min}")
    return SITE_TOML.format(
        name=quote(name), rpc_url=quote(rpc_url), deployment=quote(deployment), store=quote(store),
        keystore=quote(keystore), password_line=password, seal_line=seal, data_section=section, poll_s=poll_s,
        stagger_s=stagger_s,
    )
