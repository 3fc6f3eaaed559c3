#!/usr/bin/env node
// A `solc` command over npm's `solc` package, for py-solc-x and forge on machines that cannot download a compiler.
"use strict";
const solc = require("solc");
const fs = require("fs");
if (process.argv.includes("--version")) {
  console.log(`solc, the solidity compiler commandline interface\nVersion: ${solc.version()}`);
} else if (process.argv.includes("--standard-json")) {
  process.stdout.write(solc.compile(fs.readFileSync(0, "utf8")));
} else {
  console.error("deploy/solc.js: only --version and --standard-json are supported");
  process.exit(1);
}
