/**
 * Guests in huge pages of 2 MiB and 1 GiB, as far as the kernel lets us have some: where regions are placed, and frames
 * through the whole relay.
 *
 * Huge pages are the machine's: all tests that take some are in this file, so that they run one after the other.
 */
import { existsSync, readFileSync, readSync, writeFileSync } from "node:fs";
import { afterAll, afterEach, describe, expect, test } from "vitest";
import { close } from "../../native/libc.ts";
import { memfdCreate } from "../../native/memfd.ts";
import { baseAddress } from "../../native/mman.ts";
import { type FileRegion, GuestMemory } from "../../src/memory/guest-memory.ts";
import { exchange } from "../datapath/traffic.ts";
import { Ends } from "./ends.ts";

const MIB = 1n << 20n;
const GIB = 1n << 30n;
const ORDINARY = [{ gpa: 0n, sizeBytes: 64n * MIB }];
const SIZES = [
  { size: "2 MiB", pageBytes: 2n * MIB },
  { size: "1 GiB", pageBytes: GIB },
];

/** The machine's pool: /sys/kernel/mm/hugepages (Linux: Documentation/admin-guide/mm/hugetlbpage.rst). */
class Pool implements Disposable {
  readonly #directory: string;
  readonly #before: number;

  constructor(pageBytes: bigint) {
    this.#directory = `/sys/kernel/mm/hugepages/hugepages-${pageBytes / 1024n}kB`;
    this.#before = existsSync(this.#directory) ? this.#read("nr") - this.#read("surplus") : 0;
  }

  /** Has so many pages free, whatever is in use. @returns why that cannot be */
  reserve(count: number): string | undefined {
    try {
      const missing = count - (this.#read("free") - this.#read("resv"));
      if (missing > 0) this.#resize(this.#read("nr") + missing);
      const free = this.#read("free") - this.#read("resv");
      return free >= count ? undefined : `the kernel has ${free} of ${count} pages`;
    } catch (error) {
      return `no such pages here, or not for us: ${(error as Error).message}`;
    }
  }

  /** Leaves the pool as large as it was. Pages in use at this moment go back when whoever uses them ends. */
  [Symbol.dispose](): void {
    if (existsSync(this.#directory) && this.#read("nr") !== this.#before) this.#resize(this.#before);
  }

  #resize(count: number): void {
    writeFileSync(`${this.#directory}/nr_hugepages`, String(count));
  }

  #read(name: "nr" | "surplus" | "free" | "resv"): number {
    return Number(readFileSync(`${this.#directory}/${name}_hugepages`, "utf8"));
  }
}

describe.each(SIZES)("huge pages of $size", ({ pageBytes }) => {
  const huge = Number(pageBytes);
  const pool = new Pool(pageBytes);
  let open = new AsyncDisposableStack();

  afterEach(async () => {
    await open.disposeAsync();
    open = new AsyncDisposableStack();
  });
  afterAll(() => pool[Symbol.dispose]());

  /** Sees to free huge pages; skips the test where there cannot be any, as root or not: that is no missing tool. */
  function need(count: number, skip: (why: string) => never): void {
    const refused = pool.reserve(count);
    if (refused !== undefined) skip(`huge pages of ${pageBytes} bytes: ${refused}`);
  }

  // The row expects mmap's EINVAL as a refusal. It never comes: what is mapped is whole huge pages around the region.
  test("BI-072 a region at an odd offset lies on whole pages; of what is mapped only it is the guest's", ({ skip }) => {
    need(2, skip);
    const memory = new GuestMemory();
    const [ordinary, fd] = [memfdCreate("test", 0x1000n), memfdCreate("test", 2n * pageBytes, huge)];
    for (const each of [ordinary, fd]) open.defer(() => close(each));
    open.defer(() => memory.clear());
    const region: FileRegion = { gpa: GIB, sizeBytes: pageBytes, mmapOffset: 0x1000n, fd };
    memory.setRegions([{ gpa: 0n, sizeBytes: 0x1000n, mmapOffset: 0n, fd: ordinary }, region]);
    const { segment, offset } = memory.locate(GIB, 1n)!;
    const { buffer } = memory.segments[segment]!;
    expect((baseAddress(memory.segments[segment]!) + offset) % pageBytes).toBe(0x1000n);
    new Uint8Array(buffer, Number(offset + pageBytes) - 1, 1)[0] = 5;
    const byte = new Uint8Array(1);
    readSync(fd, byte, 0, 1, pageBytes + 0xfffn);
    expect(byte[0]).toBe(5);
    expect(memory.locate(GIB + pageBytes, 1n)).toBeUndefined();
  });

  test("frames flow between a guest of huge pages and one of ordinary ones", async ({ skip }) => {
    const sizeBytes = pageBytes < 16n * MIB ? 16n * MIB : pageBytes;
    need(Number(sizeBytes / pageBytes), skip);
    const ends = open.use(await Ends.start());
    const a = await ends.connect("a", ends.guest([{ gpa: 0n, sizeBytes }], huge));
    const b = await ends.connect("b", ends.guest(ORDINARY));
    await exchange(a, b, 1000);
    await exchange(b, a, 1000);
    ends.expectNothingLost();
  });

  test("huge pages come and go while frames flow", async ({ skip }) => {
    need(1, skip);
    const ends = open.use(await Ends.start());
    const a = await ends.connectSlots("a", ends.guest(ORDINARY));
    const b = await ends.connect("b", ends.guest(ORDINARY));
    const fd = memfdCreate("plugged", pageBytes, huge);
    open.defer(() => close(fd));
    const region = { gpa: 4n * GIB, sizeBytes: pageBytes, userAddress: 0x7000_0000_0000n, mmapOffset: 0n, fd };
    await ends.expectNothingLostWhile(a, b, async () => {
      for (let n = 0; n < 20; n++) {
        await a.frontend.addMemReg(region);
        await a.frontend.remMemReg(region);
      }
    });
  });
});
