/**
 * What a vhost-user session drives: the device behind the socket.
 *
 * The session calls sequentially: one message is completed (the promise has settled) before the next is handled, and
 * only then is it acknowledged. So whatever a call asks for is in effect everywhere, pollers included, once its
 * promise settles. A call that rejects with a RelayError is a refusal: it must leave the device as it was.
 */

/** A piece of guest memory: [gpa, gpa + sizeBytes) is [mmapOffset, mmapOffset + sizeBytes) of the file `fd`. */
export interface MemoryRegion {
  gpa: bigint;
  sizeBytes: bigint;
  /** The front-end's own virtual address of the region; ring addresses come in this space. */
  userAddress: bigint;
  mmapOffset: bigint;
  /** Valid until setMemory or addMemory settles: map it, do not keep it. */
  fd: number;
}

/**
 * One started virtqueue, its addresses translated to guest physical ones, aligned and each inside one region. With
 * VIRTIO_F_RING_PACKED acknowledged: the descriptor ring and the driver's and the device's event suppression structure.
 */
export interface Vring {
  index: number;
  /** Entries, at most 32768; of a split ring a power of two. */
  size: number;
  desc: bigint;
  avail: bigint;
  used: bigint;
  /**
   * Next avail index (mod 2^16) when the ring starts, of a packed ring the position (slot | wrap counter << 15), which the
   * ring itself may belie; of no meaning in updateVring and setMemory.
   */
  base: number;
  enabled: boolean;
  /** Eventfds (call and err may be sockets); undefined: poll, or do not notify. Owned by the session. */
  kick: number | undefined;
  call: number | undefined;
  err: number | undefined;
  /** The ring's part of the inflight region, if there is one: what keeps its state for the next back-end. */
  inflight: InflightPlace | undefined;
}

/** A ring's part of an inflight region. */
export interface InflightPlace {
  /** A sealed memory file, valid while the ring is started. */
  fd: number;
  /** Of the part in the file, a multiple of 64. */
  offset: bigint;
}

export interface Device {
  /** Virtio features offered, without bit 30 (VHOST_USER_F_PROTOCOL_FEATURES). */
  readonly features: bigint;
  /** Queue pairs; virtqueues 2n and 2n + 1 are pair n. */
  readonly queuePairs: number;
  /** Bytes of memory regions that are taken, all together. */
  readonly memoryMaxBytes: bigint;
  /** What GET_QUEUE_NUM counts. */
  readonly queueUnit: "pairs" | "vrings";
  /** The start of the configuration space, the rest is 0; undefined: it is the front-end's business. */
  readonly config: Uint8Array | undefined;
  /** The MTU that the front-end gave its driver; called only by a device that offers VIRTIO_NET_F_MTU. */
  setMtu(mtu: number): void;
  /** Tells the network that the station with this address is here now; not waited for. */
  announce(mac: Uint8Array): void;
  /** Virtio features the driver acknowledged, without bit 30; called only while no ring is started. */
  setFeatures(features: bigint): Promise<void>;
  /**
   * Exactly these regions from now on; `vrings` are the started rings, addresses translated anew. Rings that the new
   * table cannot translate were stopped before. Rejecting leaves the old table in force.
   */
  setMemory(regions: readonly MemoryRegion[], vrings: readonly Vring[]): Promise<void>;
  /** One more region, which overlaps no other; started rings stay where they are. */
  addMemory(region: MemoryRegion): Promise<void>;
  /** The region at this gpa is gone. Rings in it were stopped before; the other started rings stay where they are. */
  removeMemory(gpa: bigint): Promise<void>;
  /** From the next instant the ring is processed; it is scanned at once. */
  startVring(vring: Vring): Promise<void>;
  /** After this settles the device touches neither the ring nor its fds. Resolves to the next avail index or position. */
  stopVring(index: number): Promise<number>;
  /** The enable bit or an fd of a started ring changed. The old fd is no longer used once it settles. */
  updateVring(vring: Vring): Promise<void>;
  /** The connection is gone: all rings stop, memory is released, features are forgotten. */
  reset(): Promise<void>;
}
