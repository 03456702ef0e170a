/**
 * The programs of other projects that the guest tests need, and the Debian packages they come in.
 */
import { accessSync, constants } from "node:fs";
import { delimiter, join } from "node:path";
import { installedRelease } from "./kernel.ts";

const packages = {
  "linux.uml": "user-mode-linux",
  "qemu-system-x86_64": "qemu-system-x86",
  "a kernel for QEMU": "linux-image-cloud-amd64",
  bash: "bash",
  busybox: "busybox-static",
  ethtool: "ethtool",
  iperf3: "iperf3",
  "dpdk-testpmd": "dpdk-dev",
  ip: "iproute2",
  tcpdump: "tcpdump",
} as const;

export type Tool = keyof typeof packages;

/** QEMU_SYSTEM names another QEMU than the one in PATH, such as a newer one. */
export const qemuSystem = process.env["QEMU_SYSTEM"] ?? "qemu-system-x86_64";

/** The tool's path, or undefined when it is not installed. */
export function findTool(tool: Tool): string | undefined {
  if (tool === "a kernel for QEMU") return installedRelease();
  const command = tool === "qemu-system-x86_64" ? qemuSystem : tool;
  return (command.includes("/") ? [""] : (process.env["PATH"] ?? "").split(delimiter))
    .map((directory) => join(directory, command))
    .find(isExecutable);
}

/**
 * Why tests that need these tools cannot run here, or undefined if they can.
 * @throws Error under CI, where a missing tool is a failure and not a reason to skip
 */
export function missingTools(...tools: Tool[]): string | undefined {
  const missing = tools.filter((tool) => findTool(tool) === undefined);
  if (missing.length === 0) return undefined;
  const reason = `needs ${missing.join(", ")}: apt-get install ${missing.map((tool) => packages[tool]).join(" ")}`;
  if (process.env["CI"] === "true") throw new Error(reason);
  return reason;
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}
