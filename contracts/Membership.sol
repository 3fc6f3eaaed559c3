// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Bits} from "./Bits.sol";
import {ISwarm} from "./ISwarm.sol";

/// @notice Who the sites are, and how they change that: by majority. The only access control; there is no owner.
abstract contract Membership is ISwarm {
    using Bits for uint256;

    uint256 internal constant SITES_MAX = 256;
    /// @dev Seconds from a proposal to its deadline: a holiday long, not a stolen key's life.
    uint256 internal constant PROPOSAL_WINDOW = 30 days;

    Site[] private _sites;
    mapping(address key => uint256 indexPlusOne) private _indexOf; // no entry for removed sites and retired keys
    uint256 public activeSites;
    address public successor;
    uint256 public proposalCount;
    mapping(uint256 proposal => Proposal) private _proposals; // counted from 1
    /// @dev How many runs that `sitesMin` sites or more have joined have this `sitesMin`.
    mapping(uint256 sitesMin => uint256 runs) internal _runsNeeding;

    constructor(Founder[] memory founders) {
        if (founders.length == 0) revert NoFounders();
        if (founders.length > SITES_MAX) revert TooManySites(founders.length, SITES_MAX);
        for (uint256 i = 0; i < founders.length; ++i) {
            _requireNew(founders[i].key, founders[i].name);
            _admit(founders[i].key, founders[i].name);
        }
    }

    // ------------------------------------------------------------------ changes

    function propose(Change kind, address subject, bytes32 data) external returns (uint256 proposal) {
        uint256 site = _activeSite();
        _requirePossible(kind, subject, data);
        proposal = ++proposalCount;
        uint256 deadline = block.timestamp + PROPOSAL_WINDOW;
        _proposals[proposal] = Proposal(subject, kind, uint40(deadline), false, data, Bits.bit(site));
        emit ChangeProposed(proposal, site, kind, subject, data, deadline);
        _executeIfAgreed(proposal);
    }

    function approve(uint256 proposal) external {
        uint256 site = _activeSite();
        Proposal storage p = _proposal(proposal);
        if (p.executed) revert ProposalExecuted(proposal, p.kind);
        if (block.timestamp >= p.deadline) revert ProposalExpired(proposal, p.deadline);
        p.approvals |= Bits.bit(site);
        emit ChangeApproved(proposal, site);
        _executeIfAgreed(proposal);
    }

    function setSealKey(bytes32 sealKey) external {
        uint256 site = siteOf(msg.sender);
        _sites[site].sealKey = sealKey;
        emit SealKeySet(site, sealKey);
    }

    function _executeIfAgreed(uint256 proposal) private {
        Proposal storage p = _proposals[proposal];
        uint256 active = activeSites;
        if ((p.approvals & active).count() * 2 <= active.count()) return;
        (Change kind, address subject, bytes32 data) = (p.kind, p.subject, p.data);
        _requirePossible(kind, subject, data);
        p.executed = true;
        if (kind == Change.Admit) _admit(subject, data);
        if (kind == Change.Remove) _remove(subject);
        if (kind == Change.RotateKey) _rotate(subject, _toKey(data));
        if (kind == Change.Retire) _retire(subject);
    }

    /// @dev Asked twice: so that no nonsense is voted on, and because the world moves between proposal and majority.
    function _requirePossible(Change kind, address subject, bytes32 data) private view {
        if (kind == Change.Retire && subject.code.length == 0) revert InvalidSuccessor(subject);
        if (kind == Change.Admit && _sites.length == SITES_MAX) revert TooManySites(SITES_MAX + 1, SITES_MAX);
        if (kind == Change.Admit) return _requireNew(subject, data);
        if (kind == Change.Retire) return;
        uint256 site = siteOf(subject);
        if (kind == Change.RotateKey) {
            if (uint256(data) > type(uint160).max) revert InvalidSite(site, _toKey(data));
            return _requireNew(_toKey(data), _sites[site].name);
        }
        uint256 active = activeSites.count();
        if (active == 1 || _runsNeeding[active] != 0) revert SitesNeeded(active - 1, active);
    }

    function _requireNew(address key, bytes32 name) private view {
        if (key == address(0) || name == 0) revert InvalidSite(_sites.length, key);
        if (_indexOf[key] != 0) revert SiteExists(key, _indexOf[key] - 1);
    }

    function _admit(address key, bytes32 name) private {
        uint256 site = _sites.length;
        _sites.push(Site(key, name, 0));
        _indexOf[key] = site + 1;
        activeSites |= Bits.bit(site);
        emit SiteAdmitted(site, key, name);
    }

    function _remove(address key) private {
        uint256 site = siteOf(key);
        delete _indexOf[key];
        activeSites &= ~Bits.bit(site);
        emit SiteRemoved(site, key);
    }

    function _rotate(address key, address newKey) private {
        uint256 site = siteOf(key);
        delete _indexOf[key];
        _indexOf[newKey] = site + 1;
        _sites[site].key = newKey;
        emit KeyRotated(site, key, newKey);
    }

    /// @dev With nobody active no round can open and no change can pass; keys stay known, to finish what is open.
    function _retire(address to) private {
        successor = to;
        activeSites = 0;
        emit ConsortiumRetired(to);
    }

    // ------------------------------------------------------------------ views

    function siteCount() public view returns (uint256) { return _sites.length; }

    function siteAt(uint256 site) external view returns (Site memory) {
        if (site >= _sites.length) revert UnknownSite(site, _sites.length);
        return _sites[site];
    }

    function siteOf(address key) public view returns (uint256) {
        uint256 indexPlusOne = _indexOf[key];
        if (indexPlusOne == 0) revert NotSite(key);
        return indexPlusOne - 1;
    }

    function proposalAt(uint256 proposal) external view returns (Proposal memory) { return _proposal(proposal); }

    /// @dev A key that is known is active, unless the whole consortium has retired.
    function _activeSite() internal view returns (uint256 site) {
        site = siteOf(msg.sender);
        if (!activeSites.has(site)) revert Retired(successor);
    }

    function _proposal(uint256 proposal) private view returns (Proposal storage) {
        if (proposal == 0 || proposal > proposalCount) revert UnknownProposal(proposal, proposalCount);
        return _proposals[proposal];
    }

    function _toKey(bytes32 data) private pure returns (address) { return address(uint160(uint256(data))); }
}
