/**
 * The memory table of a session: checks of its regions, and translation of user addresses to guest physical ones.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Memory region description"; docs/PROTOCOL.md, 4.1 and 7.
 * Immutable. Holds no fds: the device maps the regions while the message that brought them is handled.
 */
import { fstatSync } from "node:fs";
import { isMemoryFile, isReadWrite } from "../../native/fd.ts";
import { addSeals, F_SEAL_SHRINK } from "../../native/memfd.ts";
import { ProtocolError } from "../errors.ts";
import { DESC_ALIGN } from "../layout/virtio.ts";
import type { RegionRecord } from "./codec.ts";
import type { MemoryRegion } from "./device.ts";

const ADDRESS_END = 1n << 64n;

/** Ring addresses are the front-end's own ones, or with GPA_ADDRESSES guest physical. */
export type AddressSpace = "userAddress" | "gpa";

interface TableEntry extends RegionRecord {
  /** Device and inode: what tells the same file from another once the fd is closed. */
  file: string;
  /** How often it was added: so often it must be removed. */
  times: number;
}

export class MemoryTable {
  readonly #entries: readonly TableEntry[];

  private constructor(entries: readonly TableEntry[]) {
    this.#entries = entries;
  }

  /** The table before any region came. */
  static readonly empty = new MemoryTable([]);

  /** Checks every region against its file and the other regions. @throws ProtocolError */
  static of(regions: readonly MemoryRegion[]): MemoryTable {
    return regions.reduce<MemoryTable>((table, region) => table.plus(region), MemoryTable.empty);
  }

  /** This table and one more region, checked against its file and the others. @throws ProtocolError */
  plus({ fd, ...region }: MemoryRegion): MemoryTable {
    const index = this.#entries.length;
    checkRange(index, "gpa", region.gpa, region.sizeBytes);
    checkRange(index, "user address", region.userAddress, region.sizeBytes);
    checkRange(index, "mmap offset", region.mmapOffset, region.sizeBytes);
    checkAlignment(index, region);
    for (const other of this.#entries) checkOverlap(index, region, other);
    return new MemoryTable([...this.#entries, { ...region, file: checkedFile(index, region, fd), times: 1 }]);
  }

  /** This table with a region counted once more that is in it already; undefined if that very one is not. */
  again({ fd, ...region }: MemoryRegion): MemoryTable | undefined {
    const known = this.#entries.find((entry) => isSameRegion(entry, region) && entry.file === fileOf(fd));
    return known && this.#replace(known, { ...known, times: known.times + 1 });
  }

  /** This table less one region, which is known by everything but its mmap offset. @throws ProtocolError if it is not there */
  without({ gpa, sizeBytes, userAddress }: RegionRecord): MemoryTable {
    const known = this.#entries.find(
      (entry) => entry.gpa === gpa && entry.sizeBytes === sizeBytes && entry.userAddress === userAddress,
    );
    if (known === undefined) {
      throw new ProtocolError(
        `there is no region at gpa ${hex(gpa)} of ${hex(sizeBytes)} bytes, user address ${hex(userAddress)}`,
      );
    }
    return this.#replace(known, known.times > 1 ? { ...known, times: known.times - 1 } : undefined);
  }

  #replace(known: TableEntry, by: TableEntry | undefined): MemoryTable {
    return new MemoryTable(this.#entries.flatMap((entry) => (entry === known ? (by ?? []) : entry)));
  }

  get size(): number {
    return this.#entries.length;
  }

  /** Of all regions together. */
  get sizeBytes(): bigint {
    return this.#entries.reduce((sum, { sizeBytes }) => sum + sizeBytes, 0n);
  }

  /** Same regions, in the same order, of the same files. */
  equals(other: MemoryTable): boolean {
    const same = (entry: TableEntry, index: number) => {
      const match = other.#entries[index];
      return match !== undefined && entry.file === match.file && isSameRegion(entry, match);
    };
    return this.#entries.length === other.#entries.length && this.#entries.every(same);
  }

  /**
   * The guest physical address of [address, address + sizeBytes) of an address space; undefined unless one region holds
   * all of it.
   */
  translate(address: bigint, sizeBytes: bigint, space: AddressSpace): bigint | undefined {
    const region = this.#entries.find(
      (entry) => address >= entry[space] && address + sizeBytes <= entry[space] + entry.sizeBytes,
    );
    return region && region.gpa + (address - region[space]);
  }
}

function isSameRegion(one: RegionRecord, other: RegionRecord): boolean {
  return (
    one.gpa === other.gpa &&
    one.sizeBytes === other.sizeBytes &&
    one.userAddress === other.userAddress &&
    one.mmapOffset === other.mmapOffset
  );
}

function fileOf(fd: number): string {
  const { dev, ino } = fstatSync(fd, { bigint: true });
  return `${dev}:${ino}`;
}

/** The end of a range must be an address too. */
function checkRange(index: number, what: string, start: bigint, sizeBytes: bigint): void {
  if (sizeBytes === 0n) throw new ProtocolError(`region ${index} is empty`);
  if (start + sizeBytes >= ADDRESS_END) {
    throw new ProtocolError(
      `region ${index}: ${what} ${hex(start)} + size ${hex(sizeBytes)} passes the end of 64 bits`,
    );
  }
}

/** A virtqueue area that is aligned in gpas must be so where it is mapped: a misaligned atomic access traps. */
function checkAlignment(index: number, { gpa, mmapOffset }: RegionRecord): void {
  if ((gpa - mmapOffset) % BigInt(DESC_ALIGN) !== 0n) {
    throw new ProtocolError(
      `region ${index}: gpa ${hex(gpa)} and mmap offset ${hex(mmapOffset)} do not differ by a multiple of ${DESC_ALIGN}`,
    );
  }
}

function checkOverlap(index: number, region: RegionRecord, other: RegionRecord): void {
  const overlaps = (start: bigint, otherStart: bigint) =>
    start < otherStart + other.sizeBytes && otherStart < start + region.sizeBytes;
  if (overlaps(region.gpa, other.gpa)) {
    throw new ProtocolError(`region ${index} at gpa ${hex(region.gpa)} overlaps the one at gpa ${hex(other.gpa)}`);
  }
  if (overlaps(region.userAddress, other.userAddress)) {
    throw new ProtocolError(
      `region ${index} at user address ${hex(region.userAddress)} overlaps the one at ${hex(other.userAddress)}`,
    );
  }
}

/** A load from a page past a file's end kills the process, one from a network file may hang it. */
function checkedFile(index: number, { mmapOffset, sizeBytes }: RegionRecord, fd: number): string {
  // First the seal, where the file takes one, then the length: nobody can shorten it in between.
  addSeals(fd, F_SEAL_SHRINK);
  const stat = fstatSync(fd, { bigint: true });
  if (!stat.isFile() || !isMemoryFile(fd)) {
    throw new ProtocolError(`region ${index} is no file on tmpfs or hugetlbfs; use a memfd or a file in /dev/shm`);
  }
  if (!isReadWrite(fd)) throw new ProtocolError(`region ${index}: its file is not open for reading and writing`);
  if (mmapOffset + sizeBytes > stat.size) {
    throw new ProtocolError(
      `region ${index} ends at byte ${hex(mmapOffset + sizeBytes)} of a file of ${hex(stat.size)} bytes`,
    );
  }
  return fileOf(fd);
}

export function hex(value: bigint): string {
  return `0x${value.toString(16)}`;
}
