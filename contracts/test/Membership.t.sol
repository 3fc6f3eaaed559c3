// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "../ISwarm.sol";
import {Swarm} from "../Swarm.sol";
import {Base, deploySwarm, keyOf, makeFounders, vm} from "./Base.t.sol";

contract MembershipTest is Base {
    uint256 internal constant MONTH = 30 days;

    function admitData(uint256 site) internal pure returns (address, bytes32) {
        return (keyOf(site), bytes32(site + 1));
    }

    function keyWord(address newKey) internal pure returns (bytes32) {
        return bytes32(uint256(uint160(newKey)));
    }

    // ------------------------------------------------------------------ founding

    function test_founders_are_sites_by_index() public view {
        assertEq(swarm.siteCount(), SITES, "count");
        assertEq(swarm.activeSites(), 15, "all active");
        for (uint256 i = 0; i < SITES; ++i) {
            ISwarm.Site memory site = swarm.siteAt(i);
            assertEq(site.key, key(i), "key");
            assertEq(site.name, bytes32(i + 1), "name");
            assertEq(site.sealKey, 0, "no seal key yet");
            assertEq(swarm.siteOf(key(i)), i, "index");
        }
        assertEq(swarm.successor(), address(0), "here");
        assertEq(swarm.proposalCount(), 0, "no proposal");
        assertEq(swarm.runCount(), 1, "one run");
    }

    function test_founding_says_so_for_every_site() public {
        address next = 0x2e234DAe75C793f67A35089C9d99245E1C58470b; // second contract of this test
        for (uint256 i = 0; i < 2; ++i) {
            vm.expectEmit(true, true, true, true, next);
            emit ISwarm.SiteAdmitted(i, key(i), bytes32(i + 1));
        }
        assertEq(address(deploySwarm(makeFounders(2))), next, "address");
    }

    function test_two_hundred_and_fifty_six_sites_and_no_more() public {
        Swarm full = deploySwarm(makeFounders(256));
        assertEq(full.activeSites(), type(uint256).max, "every bit");
        expect(ISwarm.TooManySites.selector, 257, 256);
        deploySwarm(makeFounders(257));
    }

    function test_invalid_admission_to_a_full_consortium() public {
        swarm = deploySwarm(makeFounders(256));
        expect(ISwarm.TooManySites.selector, 257, 256);
        propose(0, ISwarm.Change.Admit, key(999), "late");
    }

    function test_invalid_no_founders() public {
        vm.expectRevert(abi.encodeWithSelector(ISwarm.NoFounders.selector));
        deploySwarm(new ISwarm.Founder[](0));
    }

    function test_invalid_founder_without_key() public {
        ISwarm.Founder[] memory founders = makeFounders(2);
        founders[1].key = address(0);
        expect(ISwarm.InvalidSite.selector, 1, 0);
        deploySwarm(founders);
    }

    function test_invalid_founder_without_name() public {
        ISwarm.Founder[] memory founders = makeFounders(2);
        founders[1].name = 0;
        vm.expectRevert(abi.encodeWithSelector(ISwarm.InvalidSite.selector, 1, key(1)));
        deploySwarm(founders);
    }

    function test_invalid_founder_twice() public {
        ISwarm.Founder[] memory founders = makeFounders(3);
        founders[2].key = key(1);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.SiteExists.selector, key(1), 1));
        deploySwarm(founders);
    }

    function test_invalid_unknown_site() public {
        expect(ISwarm.UnknownSite.selector, 4, 4);
        swarm.siteAt(4);
        expect(ISwarm.NotSite.selector, OUTSIDER);
        swarm.siteOf(OUTSIDER);
    }

    // ------------------------------------------------------------------ proposals

    function test_proposal_is_recorded_with_its_proposers_approval() public {
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.ChangeProposed(1, 2, ISwarm.Change.Admit, key(4), "five", START + MONTH);
        assertEq(propose(2, ISwarm.Change.Admit, key(4), "five"), 1, "counted from 1");
        ISwarm.Proposal memory p = swarm.proposalAt(1);
        assertEq(p.subject, key(4), "subject");
        assertEq(p.data, "five", "data");
        assertEq(p.deadline, START + MONTH, "deadline");
        assertEq(p.approvals, 4, "approved by site 2");
        assertTrue(p.kind == ISwarm.Change.Admit && !p.executed, "open");
        assertEq(swarm.proposalCount(), 1, "count");
    }

    function test_majority_carries_out_and_not_half() public {
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(4), "five");
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.ChangeApproved(proposal, 1);
        approve(1, proposal);
        assertEq(swarm.siteCount(), 4, "two of four are no majority");
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.SiteAdmitted(4, key(4), "five");
        approve(2, proposal);
        assertEq(swarm.siteCount(), 5, "three are");
        assertTrue(swarm.proposalAt(proposal).executed, "executed");
    }

    function test_single_site_decides_alone() public {
        swarm = deploySwarm(makeFounders(1));
        propose(0, ISwarm.Change.Admit, key(1), "two");
        assertEq(swarm.activeSites(), 3, "admitted at once");
    }

    function test_approving_twice_counts_once() public {
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(4), "five");
        for (uint256 i = 0; i < 5; ++i) approve(0, proposal);
        approve(1, proposal);
        assertEq(swarm.siteCount(), 4, "two sites, whatever they repeat");
    }

    function test_proposals_are_independent() public {
        uint256 first = propose(0, ISwarm.Change.Admit, key(4), "five");
        uint256 second = propose(1, ISwarm.Change.Admit, key(5), "six");
        approve(2, first);
        approve(2, second);
        approve(3, second);
        assertEq(swarm.siteOf(key(5)), 4, "the second passed");
        assertEq(swarm.siteCount(), 5, "the first did not");
    }

    function test_new_site_counts_for_proposals_before_it() public {
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(5), "six");
        approve(1, proposal);
        admit(4);
        approve(0, proposal);
        assertEq(swarm.siteCount(), 5, "two of five");
        approve(4, proposal);
        assertEq(swarm.siteCount(), 6, "three of five");
    }

    /// @dev A removal can turn a minority into a majority; anyone who has approved may have the votes counted again.
    function test_approving_again_counts_the_votes_of_now() public {
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(5), "six");
        approve(1, proposal);
        remove(3);
        assertEq(swarm.siteCount(), 4, "nobody has asked yet");
        approve(0, proposal);
        assertEq(swarm.siteCount(), 5, "two of three");
    }

    function test_invalid_unknown_proposal() public {
        expect(ISwarm.UnknownProposal.selector, 1, 0);
        approve(0, 1);
        expect(ISwarm.UnknownProposal.selector, 0, 0);
        swarm.proposalAt(0);
        propose(0, ISwarm.Change.Admit, key(4), "five");
        expect(ISwarm.UnknownProposal.selector, 2, 1);
        swarm.proposalAt(2);
    }

    function test_invalid_executed_proposal() public {
        uint256 proposal = change(ISwarm.Change.RotateKey, key(3), keyWord(address(0x77)));
        expect(ISwarm.ProposalExecuted.selector, proposal, uint256(ISwarm.Change.RotateKey));
        approve(0, proposal);
    }

    function test_proposal_lives_until_its_deadline() public {
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(4), "five");
        approve(1, proposal);
        pass(MONTH - 1);
        approve(2, proposal);
        assertEq(swarm.siteCount(), 5, "in its last second");
    }

    function test_invalid_expired_proposal() public {
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(4), "five");
        pass(MONTH);
        expect(ISwarm.ProposalExpired.selector, proposal, START + MONTH);
        approve(1, proposal);
    }

    function test_invalid_calls_of_an_outsider() public {
        expect(ISwarm.NotSite.selector, OUTSIDER);
        vm.prank(OUTSIDER);
        swarm.propose(ISwarm.Change.Admit, OUTSIDER, "me");
        propose(0, ISwarm.Change.Admit, key(4), "five");
        expect(ISwarm.NotSite.selector, OUTSIDER);
        vm.prank(OUTSIDER);
        swarm.approve(1);
        expect(ISwarm.NotSite.selector, OUTSIDER);
        vm.prank(OUTSIDER);
        swarm.setSealKey("mine");
    }

    // ------------------------------------------------------------------ admit

    function test_admitted_site_takes_part_from_the_next_round() public {
        open(0);
        admit(4);
        join(4);
        assertEq(view_().members, 15, "not of the open round");
        expect(ISwarm.NotMember.selector, 1, 4);
        commit(4, 1);
        finalize(1, C1);
        open(4);
        assertEq(view_().members, 31, "of the next");
    }

    function test_invalid_admission() public {
        vm.expectRevert(abi.encodeWithSelector(ISwarm.SiteExists.selector, key(3), 3));
        propose(0, ISwarm.Change.Admit, key(3), "again");
        expect(ISwarm.InvalidSite.selector, 4, 0);
        propose(0, ISwarm.Change.Admit, address(0), "nobody");
        vm.expectRevert(abi.encodeWithSelector(ISwarm.InvalidSite.selector, 4, key(4)));
        propose(0, ISwarm.Change.Admit, key(4), 0);
    }

    /// @dev Two proposals for one key: the world has moved when the second finds its majority.
    function test_invalid_admission_of_who_came_in_meanwhile() public {
        uint256 first = propose(0, ISwarm.Change.Admit, key(4), "five");
        uint256 second = propose(1, ISwarm.Change.Admit, key(4), "five");
        approve(1, first);
        approve(2, first);
        approve(2, second);
        vm.expectRevert(abi.encodeWithSelector(ISwarm.SiteExists.selector, key(4), 4));
        approve(3, second);
        assertEq(swarm.proposalAt(second).approvals, 6, "the refused approval left no trace");
    }

    // ------------------------------------------------------------------ remove

    function test_removed_site_falls_silent_at_once() public {
        open(0);
        commit(3, 1);
        uint256 proposal = almostChange(ISwarm.Change.Remove, key(3), 0);
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.SiteRemoved(3, key(3));
        approve(2, proposal);
        assertEq(swarm.activeSites(), 7, "three left");
        assertEq(swarm.siteCount(), 4, "its index stays taken");
        assertEq(swarm.siteAt(3).key, key(3), "and its record readable");
        expect(ISwarm.NotSite.selector, key(3));
        vote(3, 1, C1, true);
    }

    function test_removal_binds_from_the_next_round() public {
        open(0);
        commit(3, 1);
        remove(3);
        ISwarm.RunView memory v = view_();
        assertEq(v.members, 15, "still in the snapshot");
        assertEq(v.committed, 8, "its commitment still counts");
        assertEq(v.quorum, 3, "so does the denominator");
        assertEq(v.joined, 7, "but not for later");
        for (uint256 i = 0; i < 3; ++i) commit(i, 1);
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        open(0);
        v = view_();
        assertEq(v.members, 7, "three members");
        assertEq(v.expected, 7, "of whom nobody waits for the fourth");
        assertEq(v.quorum, 2, "two of three");
    }

    function test_removed_key_may_come_back_as_another_site() public {
        remove(3);
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(3), "again");
        approve(1, proposal);
        assertEq(swarm.siteOf(key(3)), 4, "a new index");
        assertEq(swarm.activeSites(), 23, "the old one stays empty");
        expect(ISwarm.NotJoined.selector, run, 4);
        announce(3);
    }

    function test_invalid_removal_of_an_outsider() public {
        expect(ISwarm.NotSite.selector, OUTSIDER);
        propose(0, ISwarm.Change.Remove, OUTSIDER, 0);
    }

    function test_invalid_removal_of_the_last_site() public {
        swarm = deploySwarm(makeFounders(1));
        expect(ISwarm.SitesNeeded.selector, 0, 1);
        propose(0, ISwarm.Change.Remove, key(0), 0);
    }

    function test_invalid_removal_below_what_a_run_needs() public {
        startRun(100, 50, 4, 0, 3);
        propose(0, ISwarm.Change.Remove, key(3), 0); // fine: three of four have joined, the run cannot go on anyway
        join(3);
        expect(ISwarm.SitesNeeded.selector, 3, 4);
        propose(0, ISwarm.Change.Remove, key(3), 0);
        expect(ISwarm.SitesNeeded.selector, 3, 4);
        this.approveRemovalByMajority();
        leave(2);
        approve(1, 1);
        approve(2, 1);
        assertEq(swarm.activeSites(), 7, "possible once a site has left the run");
    }

    function approveRemovalByMajority() external {
        approve(1, 1);
        approve(2, 1);
    }

    function test_removal_minds_every_run() public {
        startRun(100, 50, 3, 0, 4);
        remove(3);
        expect(ISwarm.SitesNeeded.selector, 2, 3);
        propose(0, ISwarm.Change.Remove, key(2), 0);
        uint256 other = proposeRun(100, 50, 3, 0);
        for (uint256 i = 0; i < 3; ++i) {
            vm.prank(key(i));
            swarm.joinRun(other);
        }
        leave(0);
        expect(ISwarm.SitesNeeded.selector, 2, 3);
        propose(0, ISwarm.Change.Remove, key(2), 0);
        run = other;
        leave(0);
        propose(0, ISwarm.Change.Remove, key(2), 0);
        approve(1, 2);
        assertEq(swarm.activeSites(), 3, "two left");
    }

    /// @dev A run that more have joined than it needs, and one that lost a removed site, count for what they are.
    function test_removed_sites_do_not_keep_a_run_up() public {
        startRun(100, 50, 3, 0, 2);
        remove(1);
        join(2); // the removed one makes way here: two have joined, not three
        propose(0, ISwarm.Change.Remove, key(3), 0);
        approve(2, 2);
        assertEq(swarm.activeSites(), 5, "no run stood in the way");
    }

    // ------------------------------------------------------------------ rotate key

    function test_rotated_key_speaks_for_its_site_in_the_open_round() public {
        address fresh = address(0x77);
        open(0);
        commit(3, 1);
        uint256 proposal = almostChange(ISwarm.Change.RotateKey, key(3), keyWord(fresh));
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.KeyRotated(3, key(3), fresh);
        approve(2, proposal);
        assertEq(swarm.siteOf(fresh), 3, "new key");
        assertEq(swarm.siteAt(3).key, fresh, "on record");
        expect(ISwarm.NotSite.selector, key(3));
        swarm.siteOf(key(3));
        expect(ISwarm.AlreadyCommitted.selector, 1, 3);
        vm.prank(fresh);
        swarm.commit(run, 1, M1);
        for (uint256 i = 0; i < 3; ++i) commit(i, 1);
        vm.prank(fresh);
        swarm.vote(run, 1, C1, M1, true, 1);
        assertEq(view_().voted, 8, "the site's vote");
        assertEq(swarm.activeSites(), 15, "nobody came or went");
    }

    function test_rotated_key_is_free_for_another_site() public {
        change(ISwarm.Change.RotateKey, key(3), keyWord(address(0x77)));
        change(ISwarm.Change.Admit, key(3), "another");
        assertEq(swarm.siteOf(key(3)), 4, "as a site of its own");
    }

    function test_invalid_rotation() public {
        expect(ISwarm.NotSite.selector, OUTSIDER);
        propose(0, ISwarm.Change.RotateKey, OUTSIDER, keyWord(address(0x77)));
        vm.expectRevert(abi.encodeWithSelector(ISwarm.SiteExists.selector, key(1), 1));
        propose(0, ISwarm.Change.RotateKey, key(3), keyWord(key(1)));
        expect(ISwarm.InvalidSite.selector, 4, 0);
        propose(0, ISwarm.Change.RotateKey, key(3), 0);
        bytes32 tooLong = bytes32(uint256(type(uint160).max) + 1 + 0x77);
        expect(ISwarm.InvalidSite.selector, 3, 0x77);
        propose(0, ISwarm.Change.RotateKey, key(3), tooLong);
    }

    function test_rotation_is_possible_in_a_full_consortium() public {
        swarm = deploySwarm(makeFounders(256));
        propose(0, ISwarm.Change.RotateKey, key(3), keyWord(address(0x7777)));
        for (uint256 i = 1; i < 129; ++i) approve(i, 1);
        assertEq(swarm.siteOf(address(0x7777)), 3, "rotated");
    }

    // ------------------------------------------------------------------ retire

    function test_retired_consortium_finishes_its_round_and_opens_no_other() public {
        Swarm next = deploySwarm(makeFounders(2));
        open(0);
        commitAll(1);
        uint256 proposal = almostChange(ISwarm.Change.Retire, address(next), 0);
        vm.expectEmit(true, true, true, true, address(swarm));
        emit ISwarm.ConsortiumRetired(address(next));
        approve(2, proposal);
        ISwarm.RunView memory v = view_();
        assertEq(v.successor, address(next), "in the view");
        assertEq(v.joined, 15, "who has joined stays readable");
        assertEq(swarm.successor(), address(next), "and on its own");
        assertEq(swarm.activeSites(), 0, "nobody is active");
        for (uint256 i = 0; i < 3; ++i) vote(i, 1, C1, true);
        assertPhase(ISwarm.Phase.Closed, ISwarm.Outcome.Finalized);
        expect(ISwarm.Retired.selector, address(next));
        open(0);
    }

    function test_invalid_calls_after_retirement() public {
        change(ISwarm.Change.Retire, address(this), 0);
        expect(ISwarm.Retired.selector, address(this));
        propose(0, ISwarm.Change.Admit, key(4), "five");
        expect(ISwarm.Retired.selector, address(this));
        approve(0, 1);
        expect(ISwarm.Retired.selector, address(this));
        proposeRun(100, 50, 2, 0);
        expect(ISwarm.Retired.selector, address(this));
        join(0);
    }

    function test_sites_may_still_leave_after_retirement() public {
        change(ISwarm.Change.Retire, address(this), 0);
        leave(1);
        assertEq(view_().joined, 13, "site 1 left");
        announce(0);
    }

    function test_invalid_successor() public {
        expect(ISwarm.InvalidSuccessor.selector, OUTSIDER);
        propose(0, ISwarm.Change.Retire, OUTSIDER, 0);
    }

    // ------------------------------------------------------------------ seal key

    function test_site_sets_its_own_seal_key_and_again() public {
        for (uint256 i = 1; i < 3; ++i) {
            vm.expectEmit(true, true, true, true, address(swarm));
            emit ISwarm.SealKeySet(2, bytes32(i));
            vm.prank(key(2));
            swarm.setSealKey(bytes32(i));
            assertEq(swarm.siteAt(2).sealKey, bytes32(i), "its own");
        }
        assertEq(swarm.siteAt(1).sealKey, 0, "and no other's");
    }

    function test_seal_key_outlives_the_rotation_of_the_key() public {
        vm.prank(key(3));
        swarm.setSealKey("box");
        change(ISwarm.Change.RotateKey, key(3), keyWord(address(0x77)));
        assertEq(swarm.siteAt(3).sealKey, "box", "kept");
    }

    // ------------------------------------------------------------------ fuzz

    /// @dev However many sites, however many approve: carried out exactly from the majority on.
    function testFuzz_majority_of_the_active_sites(uint8 sites, uint256 approving) public {
        uint256 count = uint256(sites) % 12 + 1;
        swarm = deploySwarm(makeFounders(count));
        uint256 proposal = propose(0, ISwarm.Change.Admit, key(50), "new");
        uint256 approvals = 1;
        for (uint256 i = 1; i < count && approvals * 2 <= count; ++i) {
            if (approving >> i & 1 == 0) continue;
            approve(i, proposal);
            ++approvals;
        }
        assertTrue((swarm.siteCount() > count) == (approvals * 2 > count), "by majority");
    }

    /// @dev Whoever is removed in whatever order, indices never move and never come back.
    function testFuzz_indices_are_for_good(uint256 order) public {
        uint256 next = SITES;
        for (uint256 step = 0; step < 6; ++step) {
            uint256 i = (order >> (8 * step)) % next;
            bool present = swarm.activeSites() >> i & 1 == 1;
            if (present && i > 2) {
                remove(i);
            } else {
                admit(next);
                assertEq(swarm.siteOf(key(next)), next, "the next index");
                ++next;
            }
            assertEq(swarm.siteCount(), next, "count");
        }
    }
}
