import { pinThread } from "../native/sched.ts";
import { buildCLane, cCarrier } from "./c-lane.ts";
import { wasmCarrier } from "./carriers.ts";
import { measure } from "./measure.ts";
import { Rig } from "./rig.ts";
pinThread(0);
const rig = new Rig(); buildCLane();
const carriers = [wasmCarrier(rig, 1), wasmCarrier(rig, 5), cCarrier(rig)];
const med=(a:number[])=>a.toSorted((x,y)=>x-y)[a.length>>1]!;
for (const mode of (process.argv[2]??"hot").split(",")) for (const [frameBytes, layout] of [[64,"one"],[1518,"one"],[64,"two"],[64,"indirect"],[9000,"merged"]] as any) {
  const f = await measure({rig,carriers,rounds:9,driverCpu:1}, mode as any, {frameBytes,layout});
  const c=f[2]!.ns;
  console.log(mode, frameBytes, layout, f.map(x=>`${x.carrier} ${med(x.ns).toFixed(1)} min ${Math.min(...x.ns).toFixed(1)}`).join(" | "), "ratio", f.slice(0,2).map(x=>med(x.ns.map((v,i)=>v/c[i]!)).toFixed(2)).join(" "));
}
for (const c of carriers) c.close();
