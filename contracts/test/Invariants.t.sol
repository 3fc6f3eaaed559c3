// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Swarm} from "../Swarm.sol";
import {Base, deploySwarm, keyOf, vm} from "./Base.t.sol";

/// @dev Calls the contract at random and keeps its own book, written the plain way: arrays instead of masks, no slot
/// reused, every rule a sentence. A call must succeed exactly when the book allows it, so the handler itself reverts
/// (and with it the test) on the first disagreement.
contract Handler {
    uint256 public constant SITES = 5;
    uint256 internal constant COMMIT_WINDOW = 100;
    uint256 internal constant VOTE_WINDOW = 50;
    uint256 internal constant SITES_MIN = 2;
    uint256 internal constant RUN = 1;

    struct Ballot {
        bool cast;
        bool accept;
        bytes32 checkpoint;
    }

    struct Round {
        bool[SITES] member;
        bool[SITES] expected;
        bool[SITES] committed;
        Ballot[SITES] ballots;
        uint256 members;
        uint256 commitDeadline;
        uint256 commitEnd; // moves forward when the last expected site has come
        bool complete;
        ISwarm.Outcome decided; // Finalized, Rejected, or Pending
        bytes32 checkpoint;
    }

    Swarm public immutable swarm;
    bool[SITES] public joined;
    bool[SITES] internal announced;
    Round[] internal rounds; // rounds[n - 1] is round n
    bytes32 public head = keccak256("spec");
    uint256 public finalized;

    constructor() {
        ISwarm.Founder[] memory founders = new ISwarm.Founder[](SITES);
        for (uint256 i = 0; i < SITES; ++i) founders[i] = ISwarm.Founder(key(i), bytes32(i + 1));
        swarm = deploySwarm(founders);
        vm.prank(key(0));
        swarm.proposeRun(keccak256("spec"), ISwarm.Terms(uint32(COMMIT_WINDOW), uint32(VOTE_WINDOW), uint16(SITES_MIN), 0));
    }

    // ------------------------------------------------------------------ what happens

    function pass(uint256 seconds_) external {
        vm.warp(block.timestamp + (seconds_ % 20));
    }

    /// @dev Long stalls, now and then: several deadlines past at once.
    function stall(uint256 seconds_) external {
        if (seconds_ % 7 == 0) vm.warp(block.timestamp + (seconds_ % 3650 days));
    }

    function join(uint256 site) public {
        site %= SITES;
        bool legal = !joined[site];
        vm.prank(key(site));
        try swarm.joinRun(RUN) {
            require(legal, "joined twice");
            (joined[site], announced[site]) = (true, true);
        } catch {
            require(!legal, "could not join");
        }
    }

    function announce(uint256 site) external {
        site %= SITES;
        vm.prank(key(site));
        try swarm.announce(RUN) {
            require(joined[site], "announced without having joined");
            announced[site] = true;
        } catch {
            require(!joined[site], "could not announce");
        }
    }

    function open(uint256 site) public {
        site %= SITES;
        (ISwarm.Phase phase,) = phaseOf(rounds.length);
        bool closed = phase == ISwarm.Phase.None || phase == ISwarm.Phase.Closed;
        bool legal = joined[site] && closed && countJoined() >= SITES_MIN;
        vm.prank(key(site));
        try swarm.openRound(RUN) {
            require(legal, "opened out of turn");
            _start();
        } catch {
            require(!legal, "could not open");
        }
    }

    function commit(uint256 site, bytes32 commitment) public {
        site %= SITES;
        uint256 n = rounds.length;
        (ISwarm.Phase phase,) = phaseOf(n);
        bool legal = phase == ISwarm.Phase.Commit && rounds[n - 1].member[site] && !rounds[n - 1].committed[site]
            && commitment != 0;
        vm.prank(key(site));
        try swarm.commit(RUN, n, commitment) {
            require(legal, "committed against the rules");
            _commit(rounds[n - 1], site);
        } catch {
            require(!legal, "could not commit");
        }
    }

    function vote(uint256 site, uint256 choice, bool accept) public {
        site %= SITES;
        uint256 n = rounds.length;
        (ISwarm.Phase phase,) = phaseOf(n);
        bool member = n != 0 && rounds[n - 1].member[site];
        bool late = phase == ISwarm.Phase.Closed && rounds[n - 1].decided != ISwarm.Outcome.Pending
            && !rounds[n - 1].ballots[site].cast && block.timestamp < rounds[n - 1].commitEnd + VOTE_WINDOW;
        bool legal = member && (phase == ISwarm.Phase.Vote || late);
        bytes32 checkpoint = keccak256(abi.encode("checkpoint", n, choice & 2));
        vm.prank(key(site));
        try swarm.vote(RUN, n, checkpoint, manifestOf(checkpoint), accept, 5_000) {
            require(legal, "voted against the rules");
            _vote(rounds[n - 1], n, site, Ballot(true, accept, checkpoint));
        } catch {
            require(!legal, "could not vote");
        }
    }

    /// @dev A whole round, as agents play it, so that runs get long: everyone comes, and votes as `choices` says, some
    /// of them twice.
    function play(uint256 choices) external {
        for (uint256 i = 0; i < SITES; ++i) {
            if (!joined[i] && choices & (1 << i) != 0) join(i);
        }
        (ISwarm.Phase phase,) = phaseOf(rounds.length);
        if (phase == ISwarm.Phase.Commit || phase == ISwarm.Phase.Vote) vm.warp(block.timestamp + 150);
        open(choices >> 8);
        uint256 coming = choices % 5 == 0 ? 1 : SITES; // a lonely commitment is no round
        for (uint256 i = 0; i < coming; ++i) commit(i, keccak256(abi.encode(choices, i)));
        if (coming == 1) vm.warp(block.timestamp + COMMIT_WINDOW);
        for (uint256 i = 0; i < 2 * SITES; ++i) {
            uint256 bits = choices >> (16 + 3 * i);
            vote(i + (bits & 1), bits & 2, bits & 4 != 0 || choices % 3 != 0);
        }
    }

    function voteOnAnotherRound(uint256 site, uint256 n) external {
        if (n == rounds.length) return;
        vm.prank(key(site % SITES));
        try swarm.vote(RUN, n, keccak256("c"), keccak256("m"), true, 1) {
            revert("voted on another round");
        } catch {}
    }

    /// @dev Whoever is no site changes nothing, whatever is called.
    function intrude(address outsider, uint256 what) external {
        for (uint256 i = 0; i < SITES; ++i) {
            if (outsider == key(i)) return;
        }
        bytes[6] memory calls = [
            abi.encodeCall(ISwarm.proposeRun, (keccak256("x"), ISwarm.Terms(10, 10, 1, 0))),
            abi.encodeCall(ISwarm.joinRun, (RUN)),
            abi.encodeCall(ISwarm.announce, (RUN)),
            abi.encodeCall(ISwarm.openRound, (RUN)),
            abi.encodeCall(ISwarm.commit, (RUN, rounds.length, keccak256("x"))),
            abi.encodeCall(ISwarm.vote, (RUN, rounds.length, keccak256("c"), keccak256("m"), true, 1))
        ];
        vm.prank(outsider);
        (bool done,) = address(swarm).call(calls[what % 6]);
        require(!done, "an outsider got through");
    }

    // ------------------------------------------------------------------ the book

    function _start() private {
        Round storage r = rounds.push();
        bool hasLast = rounds.length > 1;
        bool known;
        for (uint256 i = 0; i < SITES; ++i) {
            r.member[i] = joined[i];
            if (joined[i]) ++r.members;
            bool came = hasLast && rounds[rounds.length - 2].committed[i];
            r.expected[i] = came || announced[i];
            announced[i] = false;
            if (r.expected[i]) known = true;
        }
        if (!known) r.expected = r.member;
        r.commitDeadline = block.timestamp + COMMIT_WINDOW;
        r.commitEnd = r.commitDeadline;
    }

    function _commit(Round storage r, uint256 site) private {
        r.committed[site] = true;
        bool all = countCommitted(r) >= SITES_MIN;
        for (uint256 i = 0; i < SITES; ++i) {
            if (r.expected[i] && !r.committed[i]) all = false;
        }
        if (all) (r.complete, r.commitEnd) = (true, block.timestamp);
    }

    function _vote(Round storage r, uint256 n, uint256 site, Ballot memory ballot) private {
        r.ballots[site] = ballot;
        if (r.decided != ISwarm.Outcome.Pending) return;
        uint256 quorum = r.members / 2 + 1;
        uint256 accepting;
        uint256 rejecting;
        for (uint256 i = 0; i < SITES; ++i) {
            Ballot memory b = r.ballots[i];
            if (b.cast && !b.accept) ++rejecting;
            if (b.cast && b.accept && b.checkpoint == ballot.checkpoint) ++accepting;
        }
        if (accepting >= quorum) {
            (r.decided, r.checkpoint) = (ISwarm.Outcome.Finalized, ballot.checkpoint);
            head = keccak256(abi.encode(head, n, ballot.checkpoint, manifestOf(ballot.checkpoint)));
            finalized = n;
        } else if (rejecting + quorum > r.members) {
            r.decided = ISwarm.Outcome.Rejected;
        }
    }

    function phaseOf(uint256 n) public view returns (ISwarm.Phase, ISwarm.Outcome) {
        if (n == 0) return (ISwarm.Phase.None, ISwarm.Outcome.Pending);
        Round storage r = rounds[n - 1];
        if (r.decided != ISwarm.Outcome.Pending) return (ISwarm.Phase.Closed, r.decided);
        if (n < rounds.length) return (ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
        if (block.timestamp < r.commitEnd) return (ISwarm.Phase.Commit, ISwarm.Outcome.Pending);
        bool voting = countCommitted(r) >= SITES_MIN && block.timestamp < r.commitEnd + VOTE_WINDOW;
        if (voting) return (ISwarm.Phase.Vote, ISwarm.Outcome.Pending);
        return (ISwarm.Phase.Closed, ISwarm.Outcome.Expired);
    }

    function roundCount() external view returns (uint256) {
        return rounds.length;
    }

    function maskOf(uint256 n, uint256 what) external view returns (uint256 mask) {
        Round storage r = rounds[n - 1];
        for (uint256 i = 0; i < SITES; ++i) {
            bool[4] memory is_ = [r.member[i], r.committed[i], r.ballots[i].cast, r.ballots[i].cast && !r.ballots[i].accept];
            if (is_[what]) mask |= 1 << i;
        }
    }

    function checkpointOf(uint256 n) external view returns (bytes32) {
        return rounds[n - 1].checkpoint;
    }

    function countJoined() public view returns (uint256 n) {
        for (uint256 i = 0; i < SITES; ++i) {
            if (joined[i]) ++n;
        }
    }

    function countCommitted(Round storage r) private view returns (uint256 n) {
        for (uint256 i = 0; i < SITES; ++i) {
            if (r.committed[i]) ++n;
        }
    }

    function key(uint256 site) public pure returns (address) {
        return address(uint160(0x1000 + site));
    }

    function manifestOf(bytes32 checkpoint) public pure returns (bytes32) {
        return keccak256(abi.encode("manifest", checkpoint));
    }
}

contract InvariantsTest is Base {
    Handler private handler;

    function setUp() public override {
        vm.warp(1_000_000);
        handler = new Handler();
        swarm = handler.swarm();
        run = 1;
    }

    /// @dev forge calls nothing but the handler.
    function targetContracts() external view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(handler);
    }

    function invariant_view_is_the_book() external view {
        ISwarm.RunView memory v = view_();
        uint256 n = handler.roundCount();
        require(v.round == n, "round");
        (ISwarm.Phase phase, ISwarm.Outcome outcome) = handler.phaseOf(n);
        require(v.phase == phase && v.outcome == outcome, "phase");
        if (n == 0) return;
        require(v.members == handler.maskOf(n, 0), "members");
        require(v.committed == handler.maskOf(n, 1), "committed");
        require(v.voted == handler.maskOf(n, 2), "voted");
        require(v.rejecting == handler.maskOf(n, 3), "rejecting");
    }

    function invariant_outcomes_of_past_rounds_never_change() external view {
        for (uint256 n = 1; n <= handler.roundCount(); ++n) {
            (ISwarm.Phase phase, ISwarm.Outcome outcome) = swarm.phaseAt(1, n, block.timestamp);
            (ISwarm.Phase phase_, ISwarm.Outcome outcome_) = handler.phaseOf(n);
            require(phase == phase_ && outcome == outcome_, "a past round changed");
        }
    }

    function invariant_head_chains_the_finalized_rounds() external view {
        ISwarm.RunView memory v = view_();
        require(v.head == handler.head(), "head");
        require(v.finalizedRound == handler.finalized(), "finalized round");
        if (v.finalizedRound != 0) require(v.checkpoint == handler.checkpointOf(v.finalizedRound), "checkpoint");
    }

    function invariant_masks_lie_within_each_other() external view {
        ISwarm.RunView memory v = view_();
        require(v.members & ~v.joined == 0, "members not joined");
        require((v.committed | v.voted) & ~v.members == 0, "not members");
        require(v.rejecting & ~v.voted == 0, "rejecting without a vote");
    }

    /// @dev Liveness: once both windows are past, any joined site can open the next round, also after ten years.
    function invariant_any_joined_site_can_always_go_on() external {
        if (handler.countJoined() < 2) return;
        uint256 now_ = block.timestamp;
        for (uint256 site = 0; site < handler.SITES(); ++site) {
            if (!handler.joined(site)) continue;
            vm.warp(now_ + (site % 2 == 0 ? 150 : 3650 days));
            (bool done,) = address(this).call(abi.encodeCall(this.tryOpen, (site)));
            require(!done, "a joined site cannot open");
        }
        vm.warp(now_);
    }

    /// @dev Opens and undoes it by reverting; returns if it could not open.
    function tryOpen(uint256 site) external {
        vm.prank(handler.key(site));
        try swarm.openRound(1) {
            revert("opened");
        } catch {}
    }
}
