/**
 * A guest's memory as its VMM sets it up: one sealed memory file, regions of it at guest physical addresses.
 *
 * The file is sparse, so that a guest of many GiB costs what is touched. Rings and buffers that a driver uses at speed
 * lie in windows: parts of guest physical memory mapped into this process, side by side even where they belong to two
 * regions. Everything else is read and written through the file, which shows the same bytes.
 */
import { readSync, writeSync } from "node:fs";
import { close } from "../../native/libc.ts";
import { addSeals, F_SEAL_GROW, F_SEAL_SHRINK, memfdCreate } from "../../native/memfd.ts";
import { baseAddress, mapShared } from "../../native/mman.ts";
import type { MemoryRegion } from "../vhost-user/device.ts";

const PAGE_SIZE = 4096n;
const WASM_PAGE_SIZE = 65536n;
/** User address of gpa 0: not 0, so that mixing up the two address spaces is noticed. */
const USER_BASE = 0x5500_0000_0000n;

/** A region to make; without `fileOffset` it follows the region before it in the file. */
export interface RegionPlan {
  gpa: bigint;
  sizeBytes: bigint;
  fileOffset?: bigint;
}

/** Guest physical [gpa, gpa + sizeBytes), mapped: byte gpa + n is byte byteOffset + n of `buffer`. */
export interface Window {
  buffer: SharedArrayBuffer;
  byteOffset: number;
  gpa: bigint;
  sizeBytes: number;
}

export class Guest implements Disposable {
  /** The memory table, as SET_MEM_TABLE wants it. The fd is the guest's. */
  readonly regions: readonly MemoryRegion[];
  readonly #fd: number;
  readonly #pageBytes: bigint;

  /**
   * @param plan regions by whole pages, not overlapping
   * @param hugePageBytes size of the pages; default: 4096, which are not huge. write() cannot reach huge ones.
   */
  constructor(plan: readonly RegionPlan[], hugePageBytes?: number) {
    let end = 0n;
    let fileBytes = 0n;
    const places = plan.map(({ gpa, sizeBytes, fileOffset = end }) => {
      end = fileOffset + sizeBytes;
      if (end > fileBytes) fileBytes = end;
      return { gpa, sizeBytes, userAddress: USER_BASE + gpa, mmapOffset: fileOffset };
    });
    const fd = (this.#fd = memfdCreate("guest", fileBytes, hugePageBytes));
    this.#pageBytes = BigInt(hugePageBytes ?? PAGE_SIZE);
    addSeals(fd, F_SEAL_SHRINK | F_SEAL_GROW);
    this.regions = places.map((place) => ({ ...place, fd }));
  }

  /** The user address of a guest physical one, for SET_VRING_ADDR. */
  userAddress(gpa: bigint): bigint {
    const { region } = this.#find(gpa);
    return region.userAddress + (gpa - region.gpa);
  }

  /**
   * Maps a part of guest memory into this process, for as long as the buffer is referenced.
   * @throws RangeError if no region holds some of it
   */
  window(gpa: bigint, sizeBytes: number): Window {
    const pageBytes = this.#pageBytes;
    const first = gpa - (gpa % pageBytes);
    const end = roundUp(gpa + BigInt(sizeBytes), pageBytes);
    // a page more, for huge pages are mapped at multiples of their size, and memory begins where it likes
    const pages = roundUp(end - first + pageBytes, WASM_PAGE_SIZE) / WASM_PAGE_SIZE;
    const memory = new WebAssembly.Memory({ initial: pages, maximum: pages, shared: true, address: "i64" });
    const base = baseAddress(memory);
    const lead = roundUp(base, pageBytes) - base;
    for (let at = first; at < end;) {
      const { region, rest } = this.#find(at);
      const length = rest < end - at ? rest : end - at;
      mapShared(
        { memory, offset: lead + (at - first), sizeBytes: length },
        this.#fd,
        region.mmapOffset + (at - region.gpa),
      );
      at += length;
    }
    return { buffer: memory.buffer, byteOffset: Number(lead + (gpa - first)), gpa, sizeBytes };
  }

  /** Bytes of guest memory. @throws RangeError if no region holds some of them */
  read(gpa: bigint, length: number): Uint8Array {
    const bytes = new Uint8Array(length);
    this.#eachPiece(gpa, bytes, (piece, position) => readSync(this.#fd, piece, 0, piece.length, position));
    return bytes;
  }

  /** Stores bytes to guest memory. @throws RangeError if no region holds some of the addresses */
  write(gpa: bigint, bytes: Uint8Array): void {
    this.#eachPiece(gpa, bytes, (piece, position) => writeSync(this.#fd, piece, 0, piece.length, position));
  }

  /** Closes the memory file. Windows stay usable. */
  [Symbol.dispose](): void {
    close(this.#fd);
  }

  #eachPiece(gpa: bigint, bytes: Uint8Array, move: (piece: Uint8Array, position: number) => number): void {
    for (let done = 0; done < bytes.length;) {
      const at = gpa + BigInt(done);
      const { region, rest } = this.#find(at);
      const length = Math.min(bytes.length - done, Number(rest));
      done += move(bytes.subarray(done, done + length), Number(region.mmapOffset + (at - region.gpa)));
    }
  }

  #find(gpa: bigint): { region: MemoryRegion; rest: bigint } {
    const region = this.regions.find((each) => gpa >= each.gpa && gpa < each.gpa + each.sizeBytes);
    if (region === undefined) throw new RangeError(`gpa 0x${gpa.toString(16)} is in no region of this guest`);
    return { region, rest: region.gpa + region.sizeBytes - gpa };
  }
}

/** Hands out pieces of a window, one after the other; nothing is ever given back. */
export class Arena {
  readonly #window: Window;
  #taken = 0;

  constructor(window: Window) {
    this.#window = window;
  }

  /** @param alignment of the piece's gpa, a power of two */
  take(sizeBytes: number, alignment: number): Window {
    const { buffer, byteOffset, gpa, sizeBytes: limit } = this.#window;
    const start = Number(roundUp(gpa + BigInt(this.#taken), BigInt(alignment)) - gpa);
    if (start + sizeBytes > limit)
      throw new RangeError(`${sizeBytes} bytes do not fit the ${limit - start} left of this window`);
    this.#taken = start + sizeBytes;
    return { buffer, byteOffset: byteOffset + start, gpa: gpa + BigInt(start), sizeBytes };
  }
}

function roundUp(value: bigint, alignment: bigint): bigint {
  return ((value + alignment - 1n) / alignment) * alignment;
}
