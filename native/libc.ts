/**
 * The C library, loaded once; every file of native/ declares its own functions on it.
 *
 * Only native/ imports koffi. A call costs 35-60 ns plus the system call: fine per batch or per message,
 * never per packet. Pointers are BigInt.
 */
import koffi from "koffi";
import { SystemError } from "../src/errors.ts";

export const libc = koffi.load("libc.so.6");

const errnoNames = new Map(Object.entries(koffi.os.errno).map(([name, value]) => [value, name]));

/** The errno of this thread's last call. */
export function errno(): number {
  return koffi.errno();
}

/** The errno values callers branch on. */
export const { EINTR, EAGAIN, ENOENT, ECONNREFUSED, ENOBUFS } = koffi.os.errno as Record<string, number> & {
  EINTR: number;
  EAGAIN: number;
  ENOENT: number;
  ECONNREFUSED: number;
  ENOBUFS: number;
};

/**
 * An error for the call that just failed.
 * @param context what was attempted, with values
 * @param number its errno, if it was told in another way
 */
export function systemError(syscall: string, context: string, number = errno()): SystemError {
  return new SystemError(syscall, number, errnoNames.get(number) ?? `E${number}`, context);
}

/** Returns `result`, or throws what errno says if it is negative. */
export function check(result: number, syscall: string, context: string): number {
  if (result < 0) throw systemError(syscall, context);
  return result;
}

const closeFd = libc.func("int close(int fd)");

/** Closes a file descriptor that this process received or made; errors are ours and thrown. */
export function close(fd: number): void {
  check(closeFd(fd), "close", `closing fd ${fd}`);
}
