/** DPDK's virtio_user ports forward through `vhost-relay run`: a polling driver, at the rate the relay takes. */
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { Relay } from "./relay.ts";
import { expectNothingLost, forward } from "./testpmd-run.ts";
import { Testpmd } from "./testpmd.ts";
import type { TestpmdOptions } from "./testpmd.ts";
import { missingTools } from "./tools.ts";

const missing = missingTools("dpdk-testpmd");
describe.skipIf(missing !== undefined)(`DPDK testpmd, one link${missing ? `: ${missing}` : ""}`, () => {
  let relay: Relay;

  beforeEach(async () => {
    relay = await Relay.start();
  });

  afterEach(async () => {
    await relay[Symbol.asyncDispose]();
  });

  const start = (options: Omit<TestpmdOptions, "sockets">) => Testpmd.start({ sockets: relay.sockets, ...options });

  test.each([
    { mergeable: true, frame: "64" },
    { mergeable: false, frame: "64" },
    { mergeable: true, frame: "1518" },
    { mergeable: false, frame: "1518" },
  ])("mergeable buffers $mergeable: frames of $frame bytes go back and forth, none is lost", async (given) => {
    await using testpmd = await start({ mergeable: given.mergeable });
    await testpmd.command(`set txpkts ${given.frame}`);
    await forward(testpmd);
    await expectNothingLost(testpmd, relay);
    await testpmd.quit();
  });

  test("a 6000-byte frame sent as a chain of three buffers arrives in merged ones", async () => {
    await using testpmd = await start({
      mergeable: true,
      maxFrameBytes: 9018,
      args: ["--enable-scatter"],
    });
    await testpmd.command("set txpkts 2000,2000,2000");
    await forward(testpmd);
    await expectNothingLost(testpmd, relay);
    await testpmd.quit();
  });

  test("ports stopped and started again reset the device by its status, and forward again", async () => {
    await using testpmd = await start({ mergeable: true });
    await forward(testpmd);
    await testpmd.command("port stop all");
    await testpmd.command("port start all");
    await testpmd.command("clear port stats all");
    await forward(testpmd);
    expect(relay.log).not.toMatch(/refused/);
    await testpmd.quit();
  });

  test("testpmd started again on the same sockets forwards again, after a clean end and after SIGKILL", async () => {
    for (const end of ["quit", "kill", "quit"] as const) {
      await using testpmd = await start({ mergeable: true });
      await forward(testpmd);
      await testpmd[end]();
    }
  });
});
