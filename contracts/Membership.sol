// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ISwarm} from "./ISwarm.sol";

/// @notice Who the sites are. The only access control: there is no owner.
abstract contract Membership is ISwarm {
    uint256 internal constant SITES_MAX = 256;

    Site[] private _sites;
    mapping(address key => uint256 indexPlusOne) private _indexOf;

    constructor(Site[] memory founders) {
        if (founders.length == 0) revert NoFounders();
        if (founders.length > SITES_MAX) revert TooManySites(founders.length, SITES_MAX);
        for (uint256 i = 0; i < founders.length; ++i) {
            _admit(founders[i]);
        }
    }

    function siteCount() public view returns (uint256) {
        return _sites.length;
    }

    function siteAt(uint256 site) external view returns (Site memory) {
        if (site >= _sites.length) revert UnknownSite(site, _sites.length);
        return _sites[site];
    }

    function siteOf(address key) public view returns (uint256) {
        uint256 indexPlusOne = _indexOf[key];
        if (indexPlusOne == 0) revert NotSite(key);
        return indexPlusOne - 1;
    }

    function _admit(Site memory site) private {
        uint256 index = _sites.length;
        if (site.key == address(0) || site.name == 0) revert InvalidSite(index, site.key);
        if (_indexOf[site.key] != 0) revert SiteExists(site.key, _indexOf[site.key] - 1);
        _sites.push(site);
        _indexOf[site.key] = index + 1;
        emit SiteAdmitted(index, site.key, site.name);
    }
}
