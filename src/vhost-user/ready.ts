/** Waiting for a socket with a deadline and a way out. */
import { watch } from "../../native/poll.ts";

/**
 * Resolves once the fd is readable or writable, the time has passed, or the signal is aborted. When it is aborted the
 * fd is no longer watched the moment abort() returns, so it may be closed there and then.
 */
export async function ready(
  fd: number,
  direction: "readable" | "writable",
  signal: AbortSignal,
  timeoutMs?: number,
): Promise<"ready" | "late" | "aborted"> {
  if (signal.aborted) return "aborted";
  const { promise, resolve } = Promise.withResolvers<"ready" | "late" | "aborted">();
  using watcher = watch(fd, { [direction]: true }, () => resolve("ready"));
  const abort = () => {
    watcher[Symbol.dispose]();
    resolve("aborted");
  };
  const timer = timeoutMs === undefined ? undefined : setTimeout(resolve, timeoutMs, "late");
  signal.addEventListener("abort", abort);
  try {
    return await promise;
  } finally {
    clearTimeout(timer);
    signal.removeEventListener("abort", abort);
  }
}
