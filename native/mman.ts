/**
 * Mapping files over the pages of a WebAssembly.Memory.
 *
 * A shared memory reserves address space; mapping a received fd MAP_SHARED|MAP_FIXED over part of it makes the
 * file's pages the memory's pages for every thread that imports it. "Unmapping" lays private anonymous memory over
 * the range again: a PROT_NONE hole would kill the process on an atomic or a bulk copy.
 * Source: mmap(2); linux/mman.h.
 */
import koffi from "koffi";
import { SystemError } from "../src/errors.ts";
import { libc, systemError } from "./libc.ts";

const PROT_READ = 1;
const PROT_WRITE = 2;
const MAP_SHARED = 0x01;
const MAP_PRIVATE = 0x02;
const MAP_FIXED = 0x10;
const MAP_ANONYMOUS = 0x20;
const MAP_NORESERVE = 0x4000;
const MADV_DONTDUMP = 16;
const MAP_FAILED = 0xffff_ffff_ffff_ffffn;
const PAGE_SIZE = 4096n;

const memset = libc.func("void *memset(void *at, int byte, size_t length)");
const mmap = libc.func("uintptr_t mmap(uintptr_t address, size_t length, int prot, int flags, int fd, int64_t offset)");
const munmap = libc.func("int munmap(uintptr_t address, size_t length)");
const madvise = libc.func("int madvise(uintptr_t address, size_t length, int advice)");

/** The address of a memory's first byte in this process: constant for the memory's life. */
export function baseAddress(memory: WebAssembly.Memory): bigint {
  return koffi.address(memset(new Uint8Array(memory.buffer, 0, 1), 0, 0n));
}

/** A page-aligned place inside one memory. */
interface MemoryRange {
  memory: WebAssembly.Memory;
  offset: bigint;
  sizeBytes: bigint;
}

/**
 * Maps `sizeBytes` of a file, shared and writable, over a range of a memory.
 * Reserves what it maps (no MAP_NORESERVE): where huge pages are short this fails, instead of a later access by SIGBUS.
 * Excluded from core dumps: a crash of ours must not write a guest's pages to disk.
 * @throws SystemError with mmap's errno (EINVAL: a hugetlbfs file wants multiples of its page size; EACCES: read-only fd)
 */
export function mapShared(range: MemoryRange, fd: number, fileOffset: bigint): void {
  const address = placeOf(range);
  mapAt(address, range, MAP_SHARED, fd, fileOffset);
  madvise(address, range.sizeBytes, MADV_DONTDUMP);
}

/** Tries a mapping where it harms nothing, so that a later mapShared of the same will not fail half way. @throws SystemError */
export function checkMappable(fd: number, fileOffset: bigint, sizeBytes: bigint): void {
  const address = BigInt(mmap(0n, sizeBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, fileOffset));
  if (address === MAP_FAILED)
    throw systemError("mmap", `mapping ${sizeBytes} bytes of fd ${fd} at file offset ${fileOffset}`);
  munmap(address, sizeBytes);
}

/** Lays inert zero pages over a range: what was mapped there is gone from every thread. */
export function mapAnonymous(range: MemoryRange): void {
  mapAt(placeOf(range), range, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0n);
}

/** A mapping past the memory's end would be readable by Wasm without a trap: the one bug that breaks the sandbox. */
function placeOf({ memory, offset, sizeBytes }: MemoryRange): bigint {
  const limit = BigInt(memory.buffer.byteLength);
  if (offset < 0n || sizeBytes <= 0n || offset % PAGE_SIZE !== 0n || sizeBytes % PAGE_SIZE !== 0n) {
    throw new RangeError(`range ${offset}+${sizeBytes} is not made of whole pages`);
  }
  if (offset + sizeBytes > limit)
    throw new RangeError(`range ${offset}+${sizeBytes} passes the memory's end at ${limit}`);
  return baseAddress(memory) + offset;
}

function mapAt(address: bigint, { sizeBytes }: MemoryRange, flags: number, fd: number, fileOffset: bigint): void {
  const result = BigInt(mmap(address, sizeBytes, PROT_READ | PROT_WRITE, flags | MAP_FIXED, fd, fileOffset));
  if (result === MAP_FAILED)
    throw systemError("mmap", `mapping ${sizeBytes} bytes of fd ${fd} at file offset ${fileOffset}`);
  if (result !== address) throw new SystemError("mmap", 0, "EFIXED", "the kernel ignored MAP_FIXED");
}
