/** Where a thread runs and what it is called: sched_setaffinity(2), prctl(2). Both act on the calling thread. */
import { check, libc } from "./libc.ts";

const PR_SET_NAME = 15;
/** cpu_set_t of glibc: 1024 bits. */
const CPU_SET_BYTES = 128;

const sched_setaffinity = libc.func("int sched_setaffinity(int pid, size_t length, void *mask)");
const prctl = libc.func("int prctl(int option, const char *name, uint64_t a, uint64_t b, uint64_t c)");

/** Pins the calling thread to one CPU, 0..1023. */
export function pinThread(cpu: number): void {
  const mask = new Uint8Array(CPU_SET_BYTES);
  mask[cpu >> 3] = 1 << (cpu & 7);
  check(
    sched_setaffinity(0, mask.length, mask),
    "sched_setaffinity",
    `pinning to CPU ${cpu}; is it online and allowed?`,
  );
}

/** Names the calling thread, as ps -T and perf show it; the kernel keeps 15 bytes. */
export function nameThread(name: string): void {
  prctl(PR_SET_NAME, name, 0n, 0n, 0n);
}
