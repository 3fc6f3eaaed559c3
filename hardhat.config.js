// Hardhat as compiler and as dev chain. The compiler is npm's solc, so that nothing is downloaded; its settings equal
// foundry.toml and deploy/compile.py, and a test compares the bytecode.
"use strict";
const path = require("path");
const { subtask } = require("hardhat/config");
const {
  TASK_COMPILE_SOLIDITY_GET_SOLC_BUILD,
  TASK_COMPILE_SOLIDITY_GET_SOURCE_PATHS,
} = require("hardhat/builtin-tasks/task-names");

const version = "0.8.30";

subtask(TASK_COMPILE_SOLIDITY_GET_SOLC_BUILD).setAction(async () => ({
  compilerPath: require.resolve("solc/soljson.js"),
  isSolcJs: true,
  version,
  longVersion: require("solc").version(),
}));

// forge's tests use cheat codes and are none of Hardhat's business
subtask(TASK_COMPILE_SOLIDITY_GET_SOURCE_PATHS).setAction(async (_, { config }, runSuper) => {
  const tests = path.join(config.paths.sources, "test") + path.sep;
  return (await runSuper()).filter((file) => !file.startsWith(tests));
});

module.exports = {
  solidity: {
    version,
    settings: {
      evmVersion: "paris",
      viaIR: true,
      optimizer: { enabled: true, runs: 200 },
      metadata: { bytecodeHash: "none", appendCBOR: false },
    },
  },
  networks: {
    hardhat: {
      chainId: 31337,
      initialBaseFeePerGas: 0,
      gasPrice: 0,
      // a failed transaction gets a receipt, as on any other chain
      throwOnTransactionFailures: false,
    },
  },
  paths: { sources: "contracts", artifacts: "build/hardhat", cache: "build/hardhat-cache" },
};
