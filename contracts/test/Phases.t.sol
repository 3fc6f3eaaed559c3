// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Bits} from "../Bits.sol";
import {ISwarm} from "../ISwarm.sol";
import "../Phases.sol";

/// @dev The pure rules. `check_` are proved for every input by halmos; forge tries each of them on random ones.
contract PhasesTest {
    // ------------------------------------------------------------------ masks

    /// Warren's count against counting.
    function testFuzz_count_of_bits(uint256 mask) public pure {
        uint256 slow;
        for (uint256 m = mask; m != 0; m &= m - 1) ++slow;
        assert(Bits.count(mask) == slow);
    }

    function test_count_of_extremes() public pure {
        assert(Bits.count(0) == 0);
        assert(Bits.count(type(uint256).max) == 256);
        for (uint256 i = 0; i < 256; ++i) {
            assert(Bits.count(1 << i) == 1);
            assert(Bits.count(type(uint256).max ^ (1 << i)) == 255);
        }
    }

    function check_bit_and_has(uint256 mask, uint8 index) public pure {
        assert(Bits.has(Bits.bit(index), index));
        assert(Bits.has(mask, index) == (mask & Bits.bit(index) != 0));
        assert(Bits.has(mask | Bits.bit(index), index));
        assert(!Bits.has(mask & ~Bits.bit(index), index));
    }

    /// A bit more is a count more; with `count(0) == 0` that is what counting is.
    function check_count_grows_by_one(uint256 mask, uint8 index) public pure {
        uint256 without = mask & ~Bits.bit(index);
        assert(Bits.count(without | Bits.bit(index)) == Bits.count(without) + 1);
    }

    /// Non-members' bits are set in the masks of a round: their number is known and comes off again.
    function check_count_without_strangers(uint256 members, uint256 present) public pure {
        present &= members;
        assert(Bits.count(~members | present) + Bits.count(members) == 256 + Bits.count(present));
    }

    // ------------------------------------------------------------------ the word

    function fieldsOf() internal pure returns (uint256[13] memory) {
        return [
            ROUND, FINALIZED_ROUND, COMMIT_END, COMMIT_WINDOW, VOTE_WINDOW, QUORUM_BPS, SITES_MIN, MEMBERS, QUORUM, PROPOSER,
            FAILURES, REJECTIONS, FLAGS
        ];
    }

    /// What is set is read; nothing else moves.
    function check_set_moves_one_field(uint256 word, uint256 value) public pure {
        uint256[13] memory fields = fieldsOf();
        State s = State.wrap(word);
        for (uint256 i = 0; i < 13; ++i) {
            uint256 fits = value & ((1 << (fields[i] & 255)) - 1);
            State t = s.set(fields[i], fits);
            assert(t.get(fields[i]) == fits);
            for (uint256 j = 0; j < 13; ++j) assert(j == i || t.get(fields[j]) == s.get(fields[j]));
        }
    }

    function check_flags(uint256 word, uint8 flag) public pure {
        State s = State.wrap(word);
        State t = s.with(flag);
        assert(State.unwrap(t) & ((1 << 248) - 1) == word & ((1 << 248) - 1));
        assert(State.unwrap(t) >> 248 == word >> 248 | flag);
        assert(flag == 0 || t.has(flag));
        assert(s.has(flag) == (uint8(word >> 248) & flag != 0));
    }

    /// Each field begins where the one before it ends, the last ends with the word, and each holds what it must.
    function test_fields_fill_the_word() public pure {
        uint256[13] memory fields = fieldsOf();
        uint256 end;
        for (uint256 i = 0; i < 13; ++i) {
            assert(fields[i] >> 8 == end);
            end += fields[i] & 255;
        }
        assert(end == 256);
        assert(COMMIT_WINDOW & 255 == 24 && VOTE_WINDOW & 255 == 24 && 90 days < 1 << 24);
        assert(MEMBERS & 255 > 8 && QUORUM & 255 > 8 && SITES_MIN & 255 > 8 && QUORUM_BPS & 255 > 13);
    }

    // ------------------------------------------------------------------ time

    /// Phases never move back, whatever the state, as time goes on.
    function check_phase_never_moves_back(uint256 word, uint256 t, uint256 later) public pure {
        if (later < t) return;
        (ISwarm.Phase before,) = State.wrap(word).phase(t);
        (ISwarm.Phase after_,) = State.wrap(word).phase(later);
        assert(uint8(after_) >= uint8(before));
    }

    /// After both windows a round is closed, whatever happened in it.
    function check_closed_after_both_windows(uint256 word, uint256 t) public pure {
        State s = State.wrap(word);
        if (s.get(ROUND) == 0 || t < s.voteDeadline()) return;
        (ISwarm.Phase phase, ISwarm.Outcome outcome) = s.phase(t);
        assert(phase == ISwarm.Phase.Closed && outcome != ISwarm.Outcome.Pending);
    }

    /// Closed and an outcome go together; what is decided does not depend on the time.
    function check_outcome_belongs_to_closed(uint256 word, uint256 t) public pure {
        State s = State.wrap(word);
        (ISwarm.Phase phase, ISwarm.Outcome outcome) = s.phase(t);
        assert((phase == ISwarm.Phase.Closed) == (outcome != ISwarm.Outcome.Pending));
        assert((phase == ISwarm.Phase.None) == (s.get(ROUND) == 0));
        if (s.get(ROUND) != 0 && s.outcome() != ISwarm.Outcome.Pending) assert(outcome == s.outcome());
    }

    /// No vote without enough commitments.
    function check_vote_needs_enough(uint256 word, uint256 t) public pure {
        (ISwarm.Phase phase,) = State.wrap(word).phase(t);
        assert(phase != ISwarm.Phase.Vote || State.wrap(word).has(ENOUGH));
    }

    // ------------------------------------------------------------------ numbers

    function check_quorum_is_a_majority_within_the_members(uint16 sites, uint16 bps) public pure {
        uint256 n = uint256(sites) % 256 + 1;
        uint256 share = uint256(bps) % 10_001;
        uint256 quorum = Phases.quorumOf(n, share);
        assert(quorum * 2 > n && quorum <= n);
        assert(quorum * 10_000 >= n * share);
    }

    function test_quorum_examples() public pure {
        uint16[5] memory sites = [uint16(1), 2, 3, 4, 256];
        uint16[5] memory majorities = [uint16(1), 2, 2, 3, 129];
        uint16[5] memory twoThirds = [uint16(1), 2, 3, 3, 171];
        for (uint256 i = 0; i < 5; ++i) {
            assert(Phases.quorumOf(sites[i], 0) == majorities[i]);
            assert(Phases.quorumOf(sites[i], 6_667) == twoThirds[i]);
            assert(Phases.quorumOf(sites[i], 10_000) == sites[i]);
        }
    }

    // ------------------------------------------------------------------ the same on random inputs

    function testFuzz_masks(uint256 a, uint256 b, uint8 index) public pure {
        check_bit_and_has(a, index);
        check_count_grows_by_one(a, index);
        check_count_without_strangers(a, b);
    }

    function testFuzz_word(uint256 word, uint256 value) public pure {
        check_set_moves_one_field(word, value);
        check_flags(word, uint8(value));
    }

    function testFuzz_time(uint256 word, uint40 t, uint40 later) public pure {
        check_phase_never_moves_back(word, t, uint256(t) + later);
        check_closed_after_both_windows(word, t);
        check_outcome_belongs_to_closed(word, t);
        check_vote_needs_enough(word, t);
    }

    function testFuzz_quorum(uint16 sites, uint16 bps) public pure {
        check_quorum_is_a_majority_within_the_members(sites, bps);
    }
}
