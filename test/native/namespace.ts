/** A network namespace for a test file: its interfaces are seen by nobody else, and go with the process. */
import { accessSync, constants } from "node:fs";
import { libc, systemError } from "../../native/libc.ts";

const CLONE_NEWNET = 0x4000_0000;
const unshare = libc.func("int unshare(int flags)");

/**
 * Moves this thread, and the processes and threads that it starts from now on, into a network namespace of their own.
 * It has no interface but a loopback, which is down. Call it at the top of a test file: vitest gives each file a
 * process.
 * @returns why TAP interfaces cannot be made here, or undefined if they can
 * @throws Error under CI, where that is a failure and not a reason to skip
 */
export function enterNewNetwork(): string | undefined {
  const reason = missing();
  if (reason !== undefined && process.env["CI"] === "true") throw new Error(reason);
  return reason;
}

function missing(): string | undefined {
  if (process.getuid?.() !== 0) return "needs root";
  try {
    accessSync("/dev/net/tun", constants.R_OK | constants.W_OK);
  } catch {
    return "needs /dev/net/tun";
  }
  return unshare(CLONE_NEWNET) === 0 ? undefined : systemError("unshare", "needs a network namespace").message;
}
