/**
 * The offloads of virtio-net (virtio 1.3, 5.1.3): which are offered, and which a virtqueue's driver negotiated.
 *
 * All that the core can do itself are offered to every driver: what the driver at the other end of a link does not take, the
 * lane does (assembly/lane/offload.ts).
 */
import { OFFLOAD_CSUM, OFFLOAD_ECN, OFFLOAD_TSO4, OFFLOAD_TSO6 } from "../layout/lane.ts";
import {
  TRANSMITQ,
  VIRTIO_NET_F_CSUM,
  VIRTIO_NET_F_GUEST_CSUM,
  VIRTIO_NET_F_GUEST_ECN,
  VIRTIO_NET_F_GUEST_TSO4,
  VIRTIO_NET_F_GUEST_TSO6,
  VIRTIO_NET_F_HOST_ECN,
  VIRTIO_NET_F_HOST_TSO4,
  VIRTIO_NET_F_HOST_TSO6,
} from "../layout/virtio.ts";

/** OFFLOAD_*, the feature by which a driver leaves it to the device, and that by which it takes it from the device. */
const OFFLOADS: readonly [offload: number, left: number, taken: number][] = [
  [OFFLOAD_CSUM, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM],
  [OFFLOAD_TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4],
  [OFFLOAD_TSO6, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6],
  [OFFLOAD_ECN, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN],
];

/** Feature bits to offer. */
export const OFFLOAD_FEATURES: readonly number[] = OFFLOADS.flatMap(([, left, taken]) => [left, taken]);

/** OFFLOAD_* of a virtqueue. @param has whether the driver acknowledged a feature */
export function offloadsOf(virtqueue: number, has: (feature: number) => boolean): number {
  const isTransmit = virtqueue % 2 === TRANSMITQ;
  return OFFLOADS.reduce((mask, [offload, left, taken]) => mask | (has(isTransmit ? left : taken) ? offload : 0), 0);
}
