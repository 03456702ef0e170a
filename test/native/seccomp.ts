/** A seccomp filter for the calling thread, and no other, for good: seccomp(2), linux/bpf_common.h. */
import { check, libc } from "../../native/libc.ts";
import { baseAddress } from "../../native/mman.ts";

/** A system call that fails: always, or only if its second argument has this value. */
export interface Refusal {
  number: number;
  second?: number;
}

const PR_SET_SECCOMP = 22;
const PR_SET_NO_NEW_PRIVS = 38;
const SECCOMP_MODE_FILTER = 2n;
const RET_ALLOW = 0x7fff_0000;
const RET_ERRNO = 0x0005_0000;
// struct seccomp_data
const DATA_NUMBER = 0;
const DATA_SECOND = 24;

const prctl = libc.func("int prctl(int option, uint64_t a, uint64_t b, uint64_t c, uint64_t d)");

/** Instructions { code, jump if true, jump if false, value }. */
type Instruction = [code: number, then: number, otherwise: number, value: number];
const load = (offset: number): Instruction => [0x20, 0, 0, offset];
const skipUnless = (value: number, count: number): Instruction => [0x15, 0, count, value];
const end = (result: number): Instruction => [0x06, 0, 0, result];

/** From now on these system calls fail in this thread. */
export function refuseCalls(refusals: readonly Refusal[], errno: number): void {
  const program = [load(DATA_NUMBER)];
  for (const { number, second } of refusals) {
    if (second === undefined) program.push(skipUnless(number, 1), end(RET_ERRNO | errno));
    else {
      program.push(skipUnless(number, 4), load(DATA_SECOND), skipUnless(second, 1), end(RET_ERRNO | errno));
      program.push(end(RET_ALLOW));
    }
  }
  program.push(end(RET_ALLOW));
  // struct sock_fprog { u16 length; pointer }, the instructions behind it, all at an address that is known
  const memory = new WebAssembly.Memory({ initial: 1, maximum: 1, shared: true });
  const view = new DataView(memory.buffer);
  view.setUint16(0, program.length, true);
  view.setBigUint64(8, baseAddress(memory) + 16n, true);
  program.forEach(([code, then, otherwise, value], i) => {
    view.setUint16(16 + 8 * i, code, true);
    view.setUint8(16 + 8 * i + 2, then);
    view.setUint8(16 + 8 * i + 3, otherwise);
    view.setUint32(16 + 8 * i + 4, value, true);
  });
  check(prctl(PR_SET_NO_NEW_PRIVS, 1n, 0n, 0n, 0n), "prctl", "PR_SET_NO_NEW_PRIVS");
  check(prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, baseAddress(memory), 0n, 0n), "prctl", "PR_SET_SECCOMP");
}
