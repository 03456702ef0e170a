/** Memory of guests that run: large and sparse, or changing while frames flow. The whole relay, over real sockets. */
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import type { Guest, RegionPlan } from "../../src/driver/guest.ts";
import { exchange } from "../datapath/traffic.ts";
import { Ends } from "./ends.ts";

const MIB = 1n << 20n;
const GIB = 1n << 30n;
let ends: Ends;

beforeEach(async () => {
  ends = await Ends.start();
});
afterEach(() => ends[Symbol.asyncDispose]());

describe("guests of 64 GiB, sparse", () => {
  /** As QEMU's q35 splits it: below 4 GiB a part, the rest above. */
  const plan: RegionPlan[] = [
    { gpa: 0n, sizeBytes: 2n * GIB },
    { gpa: 4n * GIB, sizeBytes: 62n * GIB },
  ];
  const end = 66n * GIB;

  test.each([
    { where: "at their ends", a: end - 8n * MIB, b: end - 8n * MIB },
    { where: "at one's beginning and the other's end", a: 0n, b: end - 8n * MIB },
    // 2 GiB and 14 of the second region are the first segment; each next one repeats 1 MiB
    { where: "around the border of two segments", a: 18n * GIB - 0x1_8340n, b: 50n * GIB - 3n * MIB - 0x1_8340n },
  ])("rings and buffers $where", async ({ a, b }) => {
    const first = await ends.connect("a", ends.guest(plan), { gpa: a });
    const second = await ends.connect("b", ends.guest(plan), { gpa: b, mergeable: false });
    await exchange(first, second, 700);
    await exchange(second, first, 700);
    ends.expectNothingLost();
  });
});

describe("while frames flow", () => {
  /** The driver is in the first region. */
  const plan: RegionPlan[] = [
    { gpa: GIB, sizeBytes: 64n * MIB },
    { gpa: 0n, sizeBytes: 4n * MIB },
    { gpa: 3n * GIB, sizeBytes: 3n * MIB },
    { gpa: 8n * GIB, sizeBytes: 20n * GIB },
  ];
  const driver = { gpa: GIB };

  test.each([
    {
      change: "other regions",
      tables: [
        [0, 1],
        [0, 2],
        [0, 3, 1],
      ],
    },
    {
      change: "another order",
      tables: [
        [0, 1, 2, 3],
        [3, 2, 1, 0],
        [2, 0, 3, 1],
      ],
    },
    { change: "all, and the driver's alone", tables: [[0, 1, 2, 3], [0]] },
  ])("SET_MEM_TABLE: $change", async ({ tables }) => {
    const guest = ends.guest(plan);
    const a = await ends.connect("a", guest, driver);
    const b = await ends.connect("b", ends.guest(plan), driver);
    await ends.expectNothingLostWhile(a, b, async () => {
      for (let n = 0; n < 20; n++) {
        await a.frontend.setMemTable(tables[n % tables.length]!.map((index) => guest.regions[index]!));
      }
    });
  });

  test("ADD_MEM_REG and REM_MEM_REG, on both sides at once", async () => {
    const guests = [ends.guest(plan), ends.guest(plan)] as const;
    const a = await ends.connectSlots("a", guests[0], driver);
    const b = await ends.connectSlots("b", guests[1], driver);
    await ends.expectNothingLostWhile(a, b, async () => {
      const change = async ({ frontend }: typeof a, [, ...others]: Guest["regions"]): Promise<void> => {
        for (let n = 0; n < 8; n++) {
          for (const region of others) await frontend.remMemReg(region);
          for (const region of others.toReversed()) await frontend.addMemReg(region);
        }
      };
      await Promise.all([change(a, guests[0].regions), change(b, guests[1].regions)]);
    });
  });

  test("SET_MEM_TABLE that moves the driver's own region: to another user address, and back", async () => {
    const guest = ends.guest(plan);
    const a = await ends.connect("a", guest, driver);
    const b = await ends.connect("b", ends.guest(plan), driver);
    await exchange(a, b, 100);
    const [own] = guest.regions;
    // the rings' addresses are the old ones: they lie nowhere now, and stop
    await a.frontend.setMemTable([{ ...own!, userAddress: 0x1000_0000n }]);
    expect(ends.relay.state.links[0]!.ports[0]!.state).toBe("connected");
    await a.frontend.setMemTable([own!]);
    await exchange(a, b, 100, { first: 100 });
    await exchange(b, a, 100);
  });
});
