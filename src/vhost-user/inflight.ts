/**
 * The inflight region of a session: a memory file in which a back-end notes what it has taken from its rings and not
 * given back, for the back-end that comes after it. The front-end keeps the file.
 *
 * Truth: QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking"; docs/PROTOCOL.md, 17. Every ring has its part, one
 * after the other; what is in a part is src/ports/recover-split.ts's and recover-packed.ts's business.
 */
import { fstatSync } from "node:fs";
import { isReadWrite } from "../../native/fd.ts";
import { addSeals, F_SEAL_GROW, F_SEAL_SHRINK, getSeals, memfdCreate } from "../../native/memfd.ts";
import { checkMappable } from "../../native/mman.ts";
import { ProtocolError, SystemError } from "../errors.ts";
import {
  INFLIGHT_ALIGN,
  INFLIGHT_OFFSET_ALIGN,
  INFLIGHT_PACKED_ENTRIES,
  INFLIGHT_PACKED_ENTRY_SIZE,
  INFLIGHT_SPLIT_ENTRIES,
  INFLIGHT_SPLIT_ENTRY_SIZE,
} from "../layout/vhost-user.ts";
import { VRING_SIZE_MAX } from "../layout/virtio.ts";
import type { RingForm } from "./areas.ts";
import type { InflightRecord } from "./codec.ts";
import type { InflightPlace } from "./device.ts";
import { hex } from "./memory-table.ts";

const PAGE_BYTES = 4096;
const ADDRESS_END = 1n << 64n;

/** Bytes of one ring's part, before the next part begins. */
export function inflightStride(queueSize: number, { isPacked }: RingForm): number {
  const bytes = isPacked
    ? INFLIGHT_PACKED_ENTRIES + INFLIGHT_PACKED_ENTRY_SIZE * queueSize
    : INFLIGHT_SPLIT_ENTRIES + INFLIGHT_SPLIT_ENTRY_SIZE * queueSize;
  return roundUp(bytes, INFLIGHT_ALIGN);
}

/** A fresh region, all zero, that nobody can shorten or lengthen; the caller closes it. @throws ProtocolError, SystemError */
export function createInflight(wanted: { queues: number; queueSize: number; vrings: number; form: RingForm }) {
  checkCounts(wanted, wanted.vrings);
  const bytes = roundUp(wanted.queues * inflightStride(wanted.queueSize, wanted.form), PAGE_BYTES);
  const fd = memfdCreate("inflight", bytes);
  addSeals(fd, F_SEAL_SHRINK | F_SEAL_GROW);
  return { fd, mmapSize: BigInt(bytes) };
}

export class InflightRegion {
  /** The file: whoever made the region closes it. */
  readonly fd: number;
  readonly #record: InflightRecord;

  /** @throws ProtocolError when the region is not what it says, or nothing to rely on */
  constructor(record: InflightRecord, fd: number, vrings: number, form: RingForm) {
    this.fd = fd;
    this.#record = record;
    checkCounts(record, vrings);
    checkFile(record, fd);
    this.#checkRoom(form);
  }

  /** The part of a ring; undefined if the region has none for it. @throws ProtocolError when the part is too short */
  place(index: number, size: number, form: RingForm): InflightPlace | undefined {
    const { queues, queueSize, mmapOffset } = this.#record;
    if (index >= queues) return undefined;
    if (size > queueSize) {
      throw new ProtocolError(`ring ${index} has ${size} entries, the inflight region is made for ${queueSize}`);
    }
    this.#checkRoom(form);
    return { fd: this.fd, offset: mmapOffset + BigInt(index * inflightStride(queueSize, form)) };
  }

  /** The acknowledged features may change after the region came. */
  #checkRoom(form: RingForm): void {
    const { queues, queueSize, mmapSize } = this.#record;
    const needed = BigInt(queues * inflightStride(queueSize, form));
    if (mmapSize >= needed) return;
    throw new ProtocolError(
      `inflight region of ${mmapSize} bytes, ${queues} queues of ${queueSize} entries need ${needed}`,
    );
  }
}

function checkCounts({ queues, queueSize }: { queues: number; queueSize: number }, vrings: number): void {
  if (queues < 1 || queues > vrings) {
    throw new ProtocolError(`inflight region for ${queues} queues, expected 1 to ${vrings}`);
  }
  if (queueSize < 1 || queueSize > VRING_SIZE_MAX) {
    throw new ProtocolError(`inflight region for queues of ${queueSize} entries, expected 1 to ${VRING_SIZE_MAX}`);
  }
}

/** A page of it is mapped in every lane: it must not become shorter. Only memfds can be held to that. */
function checkFile({ mmapSize, mmapOffset }: InflightRecord, fd: number): void {
  if (mmapOffset % BigInt(INFLIGHT_OFFSET_ALIGN) !== 0n) {
    throw new ProtocolError(`inflight region at offset ${hex(mmapOffset)}, no multiple of ${INFLIGHT_OFFSET_ALIGN}`);
  }
  addSeals(fd, F_SEAL_SHRINK);
  if ((getSeals(fd) & F_SEAL_SHRINK) === 0 || !isReadWrite(fd)) {
    throw new ProtocolError("inflight region: its file is no writable memfd that can be sealed against shrinking");
  }
  const { size, blksize } = fstatSync(fd, { bigint: true });
  if (blksize !== BigInt(PAGE_BYTES)) throw new ProtocolError("inflight region: its file has huge pages");
  if (mmapOffset + mmapSize >= ADDRESS_END || mmapOffset + mmapSize > size) {
    throw new ProtocolError(
      `inflight region ends at byte ${hex(mmapOffset + mmapSize)} of a file of ${hex(size)} bytes`,
    );
  }
  try {
    checkMappable(fd, mmapOffset, BigInt(PAGE_BYTES));
  } catch (error) {
    throw error instanceof SystemError ? new ProtocolError(`inflight region: ${error.message}`) : error;
  }
}

function roundUp(bytes: number, multiple: number): number {
  return Math.ceil(bytes / multiple) * multiple;
}
