/**
 * The state of one session, and the ring state machine that joins it to the device.
 *
 * Truth: docs/PROTOCOL.md, 5. Every method completes on the device before the state says so; when the device
 * refuses, the state is what it was.
 */
import { close } from "../../native/libc.ts";
import { ProtocolError, RelayError } from "../errors.ts";
import {
  MEM_SLOTS_MAX,
  VHOST_USER_PROTOCOL_F_BACKEND_REQ,
  VHOST_USER_PROTOCOL_F_CONFIG,
  VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS,
  VHOST_USER_PROTOCOL_F_DEVICE_STATE,
  VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT,
  VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN,
  VHOST_USER_PROTOCOL_F_GPA_ADDRESSES,
  VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD,
  VHOST_USER_PROTOCOL_F_MQ,
  VHOST_USER_PROTOCOL_F_MTU,
  VHOST_USER_PROTOCOL_F_RARP,
  VHOST_USER_PROTOCOL_F_REPLY_ACK,
  VHOST_USER_PROTOCOL_F_RESET_DEVICE,
  VHOST_USER_PROTOCOL_F_STATUS,
} from "../layout/vhost-user.ts";
import { VHOST_USER_F_PROTOCOL_FEATURES, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_NET_F_MTU } from "../layout/virtio.ts";
import { ringForm } from "./areas.ts";
import type { Areas, RingForm } from "./areas.ts";
import type { RegionRecord } from "./codec.ts";
import type { Device, MemoryRegion, Vring } from "./device.ts";
import { checkState, encodeState, StateTransfer } from "./device-state.ts";
import type { InflightRegion } from "./inflight.ts";
import { ANNOUNCEMENTS, Rate } from "./limits.ts";
import { hex, MemoryTable } from "./memory-table.ts";
import { VringState } from "./vring.ts";

export const PROTOCOL_FEATURES_BIT = bit(VHOST_USER_F_PROTOCOL_FEATURES);

/** The protocol features that every device gets. */
const COMMON_PROTOCOL_FEATURES =
  bit(VHOST_USER_PROTOCOL_F_MQ) |
  bit(VHOST_USER_PROTOCOL_F_RARP) |
  bit(VHOST_USER_PROTOCOL_F_REPLY_ACK) |
  bit(VHOST_USER_PROTOCOL_F_BACKEND_REQ) |
  bit(VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD) |
  bit(VHOST_USER_PROTOCOL_F_RESET_DEVICE) |
  bit(VHOST_USER_PROTOCOL_F_CONFIGURE_MEM_SLOTS) |
  bit(VHOST_USER_PROTOCOL_F_STATUS) |
  bit(VHOST_USER_PROTOCOL_F_DEVICE_STATE) |
  bit(VHOST_USER_PROTOCOL_F_GET_VRING_BASE_INFLIGHT) |
  bit(VHOST_USER_PROTOCOL_F_GPA_ADDRESSES) |
  bit(VHOST_USER_PROTOCOL_F_GET_VRING_BASE_SKIP_DRAIN);

export class SessionState {
  readonly device: Device;
  readonly vrings: readonly VringState[];
  /** What SET_FEATURES acknowledged, bit 30 included; undefined before. */
  features: bigint | undefined;
  protocolFeatures = 0n;
  /** The last SET_FEATURES was refused. */
  featuresRefused = false;
  /** The virtio device status, as the front-end reported it. */
  status = 0;
  #table = MemoryTable.empty;
  #backendRequestFd: number | undefined;
  #inflight: InflightRegion | undefined;
  #transfer: StateTransfer | undefined;
  readonly #announcements = new Rate(ANNOUNCEMENTS);

  constructor(device: Device) {
    this.device = device;
    this.vrings = Array.from({ length: 2 * device.queuePairs }, (_, index) => new VringState(index));
  }

  get offeredProtocolFeatures(): bigint {
    const { config, features } = this.device;
    return (
      COMMON_PROTOCOL_FEATURES |
      (config === undefined ? 0n : bit(VHOST_USER_PROTOCOL_F_CONFIG)) |
      ((features & bit(VIRTIO_NET_F_MTU)) === 0n ? 0n : bit(VHOST_USER_PROTOCOL_F_MTU))
    );
  }

  /** @throws ProtocolError when there is no such ring */
  vring(index: number): VringState {
    const ring = this.vrings[index];
    if (ring === undefined) throw new ProtocolError(`ring ${index} does not exist, there are ${this.vrings.length}`);
    return ring;
  }

  /** The ring, if its size, addresses and base may be set. @throws ProtocolError while it runs */
  settableVring(index: number): VringState {
    const ring = this.vring(index);
    if (ring.running !== undefined)
      throw new ProtocolError(`ring ${index} is started; stop it by GET_VRING_BASE first`);
    return ring;
  }

  /** The form of the rings by the features acknowledged, so far split ones. */
  get form(): RingForm {
    return ringForm(this.features ?? 0n);
  }

  isNegotiated(protocolFeature: number): boolean {
    return (this.protocolFeatures & bit(protocolFeature)) !== 0n;
  }

  /** Features may change only while no ring runs; without bit 30 all rings are enabled from now on. */
  async setFeatures(features: bigint): Promise<void> {
    if (this.#isRunning) {
      if (features !== this.features) throw new ProtocolError("features cannot change while a ring is started");
      return;
    }
    await this.device.setFeatures(features & ~PROTOCOL_FEATURES_BIT);
    this.features = features;
    if ((features & PROTOCOL_FEATURES_BIT) === 0n) for (const ring of this.vrings) ring.enabled = true;
  }

  /** Replaces the memory table. */
  async setMemory(regions: readonly MemoryRegion[]): Promise<void> {
    const table = MemoryTable.of(regions);
    if (table.equals(this.#table)) return;
    this.#checkMemory(table);
    await this.#changeTable(table, (vrings) => this.device.setMemory(regions, vrings));
  }

  /** QEMU before 8 adds and removes each region once a queue pair: what was added n times is gone when it was removed n times. */
  async addMemory(region: MemoryRegion): Promise<void> {
    const again = this.#table.again(region);
    if (again) {
      this.#table = again;
      return;
    }
    if (this.#table.size >= MEM_SLOTS_MAX)
      throw new ProtocolError(`there are ${MEM_SLOTS_MAX} regions, the most taken`);
    const table = this.#table.plus(region);
    this.#checkMemory(table);
    await this.#changeTable(table, () => this.device.addMemory(region));
  }

  async removeMemory(region: RegionRecord): Promise<void> {
    const table = this.#table.without(region);
    if (table.equals(this.#table)) this.#table = table;
    else await this.#changeTable(table, () => this.device.removeMemory(region.gpa));
  }

  /** Gives a ring its size or its addresses; a kicked ring starts if it is complete now. */
  async configure(ring: VringState, values: { size: number } | { addresses: Areas }): Promise<void> {
    const { size, addresses } = ring;
    Object.assign(ring, values);
    try {
      if ("addresses" in values) this.#checkPlaceable(ring, values.addresses);
      await this.#start(ring);
    } catch (error) {
      Object.assign(ring, { size, addresses });
      throw error;
    }
  }

  /** Ends the ring; its base is where it stopped. */
  async stop(ring: VringState): Promise<void> {
    if (ring.running !== undefined) await this.#pause(ring);
    ring.stopped();
  }

  async enable(ring: VringState, enabled: boolean): Promise<void> {
    const before = ring.enabled;
    ring.enabled = enabled;
    try {
      await this.#update(ring);
    } catch (error) {
      ring.enabled = before;
      throw error;
    }
  }

  /** Takes `fd` over once it is in effect; before, and when the device refuses it, it is the caller's. */
  async setFd(ring: VringState, which: "kick" | "call" | "err", fd: number | undefined): Promise<void> {
    const before = ring[which];
    const kicked = ring.kicked;
    ring[which] = fd;
    ring.kicked ||= which === "kick";
    try {
      await (ring.running === undefined ? this.#start(ring) : this.#update(ring));
    } catch (error) {
      ring[which] = before;
      ring.kicked = kicked;
      throw error;
    }
    if (before !== undefined) close(before);
  }

  /** Status 0 resets the device. FEATURES_OK does not stay if the features were refused: so the driver learns of it. */
  async setStatus(status: number): Promise<void> {
    if (status === 0) await this.resetDevice();
    this.status = this.featuresRefused ? status & ~VIRTIO_CONFIG_S_FEATURES_OK : status;
  }

  /** All is initial again, but what front-ends send only once: memory, protocol features, err fds, back-end socket, inflight region. */
  async resetDevice(): Promise<void> {
    try {
      for (const ring of this.vrings) if (ring.running !== undefined) await this.#pause(ring);
      await this.device.setFeatures(0n);
    } catch (error) {
      await this.#startAll();
      throw error;
    }
    for (const ring of this.vrings) ring.reset();
    this.features = undefined;
    this.featuresRefused = false;
    this.status = 0;
  }

  setBackendRequestFd(fd: number): void {
    if (this.#backendRequestFd !== undefined) close(this.#backendRequestFd);
    this.#backendRequestFd = fd;
  }

  /** Takes the region's fd over; the rings that start from now on use it. @throws ProtocolError while a ring runs */
  setInflight(region: InflightRegion): void {
    if (this.#isRunning) {
      throw new ProtocolError("the inflight region cannot change while a ring is started");
    }
    if (this.#inflight !== undefined) close(this.#inflight.fd);
    this.#inflight = region;
  }

  /** @throws ProtocolError when there were too many of late */
  announce(mac: Uint8Array): void {
    if (!this.#announcements.take()) {
      const { burst, perSecond } = ANNOUNCEMENTS;
      throw new ProtocolError(`more than ${burst} announcements, or ${perSecond} a second`);
    }
    this.device.announce(mac);
  }

  /** Begins to save or load the device's state; the fd stays the caller's. @throws ProtocolError while a ring runs */
  transferState(fd: number, direction: "save" | "load"): void {
    if (this.#isRunning) throw new ProtocolError("the device's state is taken when all rings are stopped");
    const offered = this.device.features | PROTOCOL_FEATURES_BIT;
    const transfer =
      direction === "save"
        ? StateTransfer.save(fd, encodeState(this.features ?? 0n))
        : StateTransfer.load(fd, (bytes) => checkState(bytes, offered));
    this.#transfer?.[Symbol.dispose]();
    this.#transfer = transfer;
  }

  /** Resolves when the state went through. @throws ProtocolError when it did not, or none was under way */
  async checkTransfer(): Promise<void> {
    if (this.#transfer === undefined) throw new ProtocolError("no state was saved or loaded");
    const error = await this.#transfer.outcome;
    this.#transfer = undefined;
    if (error !== undefined) throw error;
  }

  /** What waits for the front-end gives up: nobody will answer it. */
  interrupt(): void {
    this.#transfer?.[Symbol.dispose]();
  }

  /** The connection is gone: the device lets go of everything, then the fds are closed. */
  async end(): Promise<void> {
    try {
      await this.device.reset();
    } finally {
      this.interrupt();
      await this.#transfer?.outcome;
      for (const ring of this.vrings) ring.closeFds();
      if (this.#backendRequestFd !== undefined) close(this.#backendRequestFd);
      this.#backendRequestFd = undefined;
      if (this.#inflight !== undefined) close(this.#inflight.fd);
      this.#inflight = undefined;
    }
  }

  get #isRunning(): boolean {
    return this.vrings.some((ring) => ring.running !== undefined);
  }

  /** Starts a kicked ring as soon as it is complete; does nothing before, or when it runs. */
  async #start(ring: VringState): Promise<void> {
    if (!ring.kicked || ring.running !== undefined) return;
    const areas = this.#translate(ring, this.#table);
    if (areas === undefined) return;
    ring.checkStartable(this.form);
    await this.device.startVring(this.#at(ring, areas));
    ring.running = areas;
  }

  async #update(ring: VringState): Promise<void> {
    if (ring.running !== undefined) await this.device.updateVring(this.#at(ring, ring.running));
  }

  /** Stops the ring on the device; it keeps its fds and addresses and will go on from where it stopped. */
  async #pause(ring: VringState): Promise<void> {
    ring.base = await this.device.stopVring(ring.index);
    ring.running = undefined;
  }

  /** Rings the new table cannot translate stop and wait, waiting rings it can translate start. */
  async #changeTable(table: MemoryTable, apply: (vrings: readonly Vring[]) => Promise<void>): Promise<void> {
    const running = this.vrings.filter((ring) => ring.running !== undefined);
    const placed = new Map(running.map((ring) => [ring, this.#translate(ring, table)]));
    try {
      for (const [ring, areas] of placed) if (areas === undefined) await this.#pause(ring);
      const kept: Vring[] = [];
      for (const [ring, areas] of placed) if (areas !== undefined) kept.push(this.#at(ring, areas));
      await apply(kept);
    } catch (error) {
      await this.#startAll();
      throw error;
    }
    this.#table = table;
    for (const [ring, areas] of placed) ring.running = areas;
    await this.#startAll();
  }

  /** Nothing is left to go back to when a ring cannot be started again, so the connection is dropped. */
  async #startAll(): Promise<void> {
    try {
      for (const ring of this.vrings) await this.#start(ring);
    } catch (error) {
      if (!(error instanceof RelayError)) throw error;
      throw new ProtocolError(`a ring did not start under a new memory table: ${error.message}`, "drop");
    }
  }

  #checkMemory({ sizeBytes }: MemoryTable): void {
    const { memoryMaxBytes } = this.device;
    if (sizeBytes <= memoryMaxBytes) return;
    throw new ProtocolError(`memory of ${sizeBytes} bytes, this port takes ${memoryMaxBytes}; see memory-max=`);
  }

  /** Nothing can be said for want of a size or a table. @throws ProtocolError when the areas could not be used now */
  #checkPlaceable(ring: VringState, { desc, avail, used }: Areas): void {
    if (ring.size === 0 || this.#table.size === 0 || this.#translate(ring, this.#table) !== undefined) return;
    throw new ProtocolError(
      `ring ${ring.index}: no single memory region holds each of its areas at ${hex(desc)}, ${hex(avail)} and ${hex(used)}`,
    );
  }

  /** The ring for the device. @throws ProtocolError when the inflight region is not made for it */
  #at(ring: VringState, areas: Areas): Vring {
    return ring.at(areas, this.form, this.#inflight?.place(ring.index, ring.size, this.form));
  }

  #translate(ring: VringState, table: MemoryTable) {
    const space = this.isNegotiated(VHOST_USER_PROTOCOL_F_GPA_ADDRESSES) ? "gpa" : "userAddress";
    return ring.translate(table, space, this.form);
  }
}

export function bit(number: number): bigint {
  return 1n << BigInt(number);
}
