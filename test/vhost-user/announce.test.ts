/** SEND_RARP. That the frame arrives: test/ports/announce.test.ts. */
import { describe, expect, it } from "vitest";
import * as L from "../../src/layout/vhost-user.ts";
import { ackOf, negotiated, RARP, USUAL_PROTOCOL_FEATURES } from "./rig.ts";

function mac(hex: string): Buffer {
  return Buffer.from(`${hex}0000`, "hex");
}

describe("SEND_RARP", () => {
  it("has the device announce the address, whatever is in the two bytes behind it", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SEND_RARP, mac("525400123456"))).toBe(0n);
    expect(await ackOf(frontend, L.VHOST_USER_SEND_RARP, Buffer.from("5254001234570102", "hex"))).toBe(0n);
    expect(rig.device.announced).toEqual(["525400123456", "525400123457"]);
  });

  it.each(["000000000000", "ffffffffffff", "010000000001"])(
    "%s, which is no station's, is refused",
    async (address) => {
      const { rig, frontend } = await negotiated();
      await using _ = rig;
      expect(await ackOf(frontend, L.VHOST_USER_SEND_RARP, mac(address))).not.toBe(0n);
      expect(rig.device.announced).toEqual([]);
    },
  );

  it("BI-051: a flood of them is cut: a few at once, then a few a second", async () => {
    const { rig, frontend } = await negotiated();
    await using _ = rig;
    const start = performance.now();
    let taken = 0;
    for (let round = 0; round < 2000; round++) {
      if ((await ackOf(frontend, L.VHOST_USER_SEND_RARP, mac("525400123456"))) === 0n) taken++;
    }
    const seconds = (performance.now() - start) / 1000;
    expect(taken).toBeGreaterThanOrEqual(16);
    expect(taken).toBeLessThanOrEqual(17 + 4 * seconds);
    expect(rig.device.announced).toHaveLength(taken);
  });

  it("without the protocol feature it is refused", async () => {
    const { rig, frontend } = await negotiated(USUAL_PROTOCOL_FEATURES & ~RARP);
    await using _ = rig;
    expect(await ackOf(frontend, L.VHOST_USER_SEND_RARP, mac("525400123456"))).not.toBe(0n);
  });
});
