// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @title ISwarm, the law of one consortium
/// @notice Sites (hospitals, laboratories) train models together. This contract registers them, keeps the state of
/// their runs and rounds, and counts their votes. It never sees data or weights: only digests, masks, times and scores.
/// @dev No owner, no upgrade, no keeper: phases are computed from stored times and masks. Masks hold one bit per site,
/// bit i for the site with index i. An index is a site's for good, so one contract sees at most 256 sites in its life.
/// Times are block timestamps in seconds. A run's live round is kept in slots that every round reuses; history is the
/// events, from which all state can be rebuilt, and the chained `head`.
interface ISwarm {
    // ------------------------------------------------------------------ nouns

    /// @notice Where a round stands. `None`: no such round yet.
    enum Phase { None, Commit, Vote, Closed }

    /// @notice How a round ended. `Pending` while it has not.
    enum Outcome { Pending, Finalized, Rejected, Expired }

    /// @notice What the sites can change about themselves, by majority. See `propose`.
    enum Change { Admit, Remove, RotateKey, Retire }

    /// @param key The site's Ethereum address: who signs for it.
    /// @param name The institution's name, UTF-8, padded with zeros.
    /// @param sealKey The site's X25519 public key, for what only sites may read; 0 until it has set one.
    struct Site { address key; bytes32 name; bytes32 sealKey; }

    /// @notice Who founds a consortium: key and name, as in `Site`.
    struct Founder { address key; bytes32 name; }

    /// @param approvals Mask of all who approved; only those who are active still count.
    struct Proposal {
        address subject; Change kind; uint40 deadline; bool executed; // one slot
        bytes32 data; uint256 approvals;
    }

    /// @notice What a run's proposer fixes and every joining site accepts.
    /// @param commitWindow Seconds from the opening of a round to its commit deadline.
    /// @param voteWindow Seconds from the end of the Commit phase to the vote deadline.
    /// @param sitesMin Contributions that a round needs; with fewer it expires.
    /// @param quorumBps Share of the members that must accept, in 1/10,000; a majority is needed in any case.
    struct Terms { uint32 commitWindow; uint32 voteWindow; uint16 sitesMin; uint16 quorumBps; }

    /// @notice All that an agent needs to know of a run, as of one timestamp. Round fields speak of the newest round.
    struct RunView {
        bytes32 spec;           // SHA-256 of the run's canonical spec
        Terms terms;
        uint256 proposer;       // index of the site that proposed the run
        uint256 joined;         // mask: sites that take part from the next round on
        address successor;      // the contract that the consortium moved to; 0 while it is here
        uint256 round;          // newest round, 0 before the first
        Phase phase;
        Outcome outcome;
        uint256 commitDeadline; // the end of the Commit phase: the deadline, or the moment the last expected site came
        uint256 voteDeadline;
        uint256 quorum;         // accepting sites that this round needs
        uint256 members;        // mask: snapshot of `joined` when the round opened
        uint256 expected;       // mask: whom the Commit phase waits for
        uint256 committed;      // mask
        uint256 voted;          // mask
        uint256 rejecting;      // mask: members whose vote does not accept
        uint256 finalizedRound; // newest finalized round, 0 if none
        bytes32 checkpoint;     // its checkpoint
        bytes32 manifest;       // its manifest
        bytes32 head;           // keccak256(head, round, checkpoint, manifest), chained over the finalized rounds, from `spec` on
        uint256 failures;       // rounds in a row before the newest one that were not finalized, 255 at most
        uint256 rejections;     // rejected rounds since the last finalized one, before the newest round, 255 at most
        bytes32[] commitments;  // by site index; 0 where the site has not committed in the newest round
    }

    // ------------------------------------------------------------------ events

    event SiteAdmitted(uint256 indexed site, address indexed key, bytes32 name);
    event SiteRemoved(uint256 indexed site, address indexed key);
    event KeyRotated(uint256 indexed site, address indexed key, address indexed newKey);
    event SealKeySet(uint256 indexed site, bytes32 sealKey);
    event ConsortiumRetired(address indexed successor);
    event ChangeProposed(
        uint256 indexed proposal, uint256 indexed site, Change kind, address subject, bytes32 data, uint256 deadline
    );
    event ChangeApproved(uint256 indexed proposal, uint256 indexed site);
    event RunProposed(uint256 indexed run, bytes32 indexed spec, uint256 indexed proposer, Terms terms);
    event RunJoined(uint256 indexed run, uint256 indexed site);
    event RunLeft(uint256 indexed run, uint256 indexed site);
    event Announced(uint256 indexed run, uint256 indexed site);
    event RoundOpened(
        uint256 indexed run, uint256 indexed round, uint256 opener, uint256 members, uint256 expected, uint256 quorum
    );
    event Committed(uint256 indexed run, uint256 indexed round, uint256 indexed site, bytes32 commitment);
    event Voted(
        uint256 indexed run, uint256 indexed round, uint256 indexed site,
        bytes32 checkpoint, bytes32 manifest, bool accept, uint256 scoreBps
    );
    event RoundFinalized(
        uint256 indexed run, uint256 indexed round, bytes32 checkpoint, bytes32 manifest, bytes32 head
    );
    event RoundRejected(uint256 indexed run, uint256 indexed round, uint256 rejecting);
    /// @notice Emitted when the round after it opens: nobody sends a transaction when a deadline passes.
    event RoundExpired(uint256 indexed run, uint256 indexed round);

    // ------------------------------------------------------------------ refusals

    error NoFounders();
    error TooManySites(uint256 sites, uint256 sitesMax);
    error InvalidSite(uint256 site, address key);
    error SiteExists(address key, uint256 site);
    error NotSite(address caller);
    error UnknownSite(uint256 site, uint256 sites);
    error UnknownProposal(uint256 proposal, uint256 proposals);
    error ProposalExpired(uint256 proposal, uint256 deadline);
    error ProposalExecuted(uint256 proposal, Change kind);
    error SitesNeeded(uint256 remaining, uint256 needed);
    error InvalidSuccessor(address successor);
    error Retired(address successor);
    error UnknownRun(uint256 run, uint256 runs);
    error EmptyDigest(uint256 run, uint256 round);
    error WindowOutOfRange(uint256 windowS, uint256 windowMaxS);
    error SitesMinOutOfRange(uint256 sitesMin, uint256 sites);
    error QuorumOutOfRange(uint256 quorumBps, uint256 quorumBpsMax);
    error AlreadyJoined(uint256 run, uint256 site);
    error NotJoined(uint256 run, uint256 site);
    error TooFewSites(uint256 joined, uint256 sitesMin);
    error WrongRound(uint256 round, uint256 current);
    error WrongPhase(Phase phase, Phase needed);
    error NotMember(uint256 round, uint256 site);
    error AlreadyCommitted(uint256 round, uint256 site);
    error ScoreOutOfRange(uint256 scoreBps, uint256 scoreBpsMax);

    // ------------------------------------------------------------------ calls that change state (sites only)

    /// @notice Propose a change of the consortium, and approve it. A majority of the sites active at that moment
    /// carries it out, in the call that completes the majority; it binds every run from its next round on.
    /// @dev Admit: `subject` signs for a new site with the name `data`. Remove: the site that `subject` signs for falls
    /// silent at once; it stays in the snapshot of rounds that are open. Never below `sitesMin` of a run that as many
    /// sites have joined. RotateKey: the site of `subject` signs as `address(uint160(data))` from now on. Retire:
    /// `subject` is the contract to go on with; open rounds end here, and no other begins.
    function propose(Change kind, address subject, bytes32 data) external returns (uint256 proposal);

    /// @notice Approve a proposal before its deadline; to do it again counts the votes again.
    function approve(uint256 proposal) external;

    /// @notice Publish the X25519 key that is to read what is sealed to this site from now on.
    function setSealKey(bytes32 sealKey) external;

    /// @notice Propose a run. It binds nobody until they join, the proposer included.
    /// @param spec SHA-256 of the run's canonical spec, which lies in the shared store.
    function proposeRun(bytes32 spec, Terms calldata terms) external returns (uint256 run);

    /// @notice Opt in to a run: the site consents to its spec and terms, and counts from the next round on.
    function joinRun(uint256 run) external;

    /// @notice Withdraw from a run, from the next round on. The round that is open keeps its members.
    function leaveRun(uint256 run) external;

    /// @notice "Wait for me": the site is expected in the next round, whether or not it committed in this one.
    function announce(uint256 run) external;

    /// @notice Open the next round. Any joined site, once the newest round is Closed and `sitesMin` sites have joined.
    /// @dev Snapshots the members. Expected are the members who committed in the newest round, announced themselves
    /// or joined since, so a dead site costs one window once; where there are none, all members are.
    function openRound(uint256 run) external returns (uint256 round);

    /// @notice Commit to a contribution without showing it.
    /// @param commitment See `computeCommitment`. Bound to chain, contract, run, round and site: a copy is worthless.
    function commit(uint256 run, uint256 round, bytes32 commitment) external;

    /// @notice Say which checkpoint and manifest this site computed, whether the checkpoint passes its gate, and how it
    /// scores on the site's own validation data.
    /// @dev A vote may move while the phase lasts. A first vote that comes after the decision but before the vote
    /// deadline and the next round is recorded and changes nothing, so that a slow site's score is not lost.
    /// @param scoreBps Score in 1/10,000.
    function vote(
        uint256 run, uint256 round, bytes32 checkpoint, bytes32 manifest, bool accept, uint256 scoreBps
    ) external;

    // ------------------------------------------------------------------ views

    function siteCount() external view returns (uint256);
    function siteAt(uint256 site) external view returns (Site memory);
    /// @notice Index of the site that signs with `key`. Reverts with `NotSite` for anyone else.
    function siteOf(address key) external view returns (uint256 site);
    /// @notice Mask of the sites that are neither removed nor, with all others, retired.
    function activeSites() external view returns (uint256 mask);
    /// @notice The contract that the consortium moved to, 0 while it is here.
    function successor() external view returns (address);
    function proposalCount() external view returns (uint256);
    function proposalAt(uint256 proposal) external view returns (Proposal memory);
    function runCount() external view returns (uint256);

    /// @notice The run as of `timestamp`; give 0 for the block's own time.
    /// @dev `eth_call` at the latest block sees that block's time, which may be long past: agents pass their estimate.
    function viewRun(uint256 run, uint256 timestamp) external view returns (RunView memory);

    /// @notice Phase and outcome of any round as of `timestamp`. Past rounds are Closed whatever the time.
    function phaseAt(uint256 run, uint256 round, uint256 timestamp) external view returns (Phase, Outcome);

    /// @notice Members that accept one (checkpoint, manifest) in the newest round.
    function acceptingOf(uint256 run, bytes32 checkpoint, bytes32 manifest) external view returns (uint256 mask);

    /// @notice keccak256(abi.encode(type, chainid, contract, run, round, site, digest, samples, salt)) with type =
    /// keccak256("swarmchain.commitment.v2"). Agents compute it off chain; this is the reference.
    /// @dev Never call it with a live salt over a node that you do not trust: it would disclose the opening.
    function computeCommitment(
        uint256 run, uint256 round, uint256 site, bytes32 digest, uint256 samples, bytes32 salt
    ) external view returns (bytes32);
}
