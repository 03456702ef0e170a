/** A process that has all the mappings it may have (vm.max_map_count): taking one away can need one more. */
import { spawnSync } from "node:child_process";
import { expect, test } from "vitest";

/** Regions that the kernel keeps as one mapping, and nearly as many others as there may be: taking out every second region fails on the way. */
const PROGRAM = `
  import { readFileSync } from "node:fs";
  import { memfdCreate } from "./native/memfd.ts";
  import { mapShared } from "./native/mman.ts";
  import { GuestMemory } from "./src/memory/guest-memory.ts";

  const PAGE = 0x1000n;
  const regions = Array.from({ length: 400 }, (_, n) => ({ gpa: BigInt(n) * PAGE, sizeBytes: PAGE, mmapOffset: BigInt(n) * PAGE }));
  const fd = memfdCreate("guest", 400n * PAGE);
  for (const region of regions) region.fd = fd;
  const guest = new GuestMemory();
  guest.setRegions(regions);
  const bytes = new Uint8Array(guest.segments[0].buffer, 0, 400 * 4096).fill(7);

  const even = regions.filter((_, n) => n % 2 === 0);
  const odd = regions.filter((_, n) => n % 2 === 1);
  const changes = {
    slot: () => odd.forEach(({ gpa }) => guest.removeRegion(gpa)),
    table: () => guest.setRegions(even),
  };
  const change = changes[process.argv[1]];
  let filler = [];
  /** Leaves some room: for what else the process may want at this moment, and for a part of the change. */
  function fill() {
    const memory = new WebAssembly.Memory({ initial: 16384n, maximum: 16384n, shared: true, address: "i64" });
    filler.push(memory);
    const most = Number(readFileSync("/proc/sys/vm/max_map_count", "utf8"));
    const now = readFileSync("/proc/self/maps", "utf8").split("\\n").length;
    for (let n = 0; n < (most - now - 200) / 2; n++) mapShared({ memory, offset: BigInt(2 * n) * PAGE, sizeBytes: PAGE }, fd, 0n);
  }
  fill();
  let failure;
  try {
    change();
  } catch (error) {
    failure = error;
  }
  const extents = guest.extents.length;
  filler = [];
  // The collector unmaps in its own time
  for (let left = 100; left > 0; left--) {
    gc();
    try {
      guest.clear();
      break;
    } catch {
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
  }
  const left = bytes.filter((byte) => byte !== 0).length;
  guest.setRegions([regions[0]]);
  console.log(JSON.stringify({ failure: failure?.code, recovery: failure?.recovery, extents, left, again: bytes[0] }));
`;

test.each(["slot", "table"])("a region that cannot be unmapped (%s): all memory is gone, the front-end too", (how) => {
  const args = ["--expose-gc", "--input-type=module-typescript", "-e", PROGRAM, how];
  const { stdout, stderr } = spawnSync(process.execPath, args, { encoding: "utf8" });
  expect(stderr).toBe("");
  expect(JSON.parse(stdout)).toEqual({
    failure: "PROTOCOL",
    recovery: "drop",
    extents: 0,
    left: 0,
    again: 7,
  });
});
