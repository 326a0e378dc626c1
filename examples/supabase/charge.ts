// A backend that charges for an answer of a model, and what its user sees of it. Needs SUPABASE_URL,
// SUPABASE_SERVICE_ROLE_KEY and SUPABASE_ANON_KEY; with USER_ID and USER_TOKEN, those of a user who is signed in. Without
// a project, local_supabase.py stands in for one.
import { createClient } from "@supabase/supabase-js";
import type { Database } from "./database.types.js";

type Usage = { model: string; input_tokens: number; output_tokens: number };

function env(name: string): string {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set`);
  return value;
}

const schema = { db: { schema: "ducto" as const } };
const credits = createClient<Database>(env("SUPABASE_URL"), env("SUPABASE_SERVICE_ROLE_KEY"), schema);

/** Holds the longest answer, lets it be made, and charges what was used. The request's id makes a retry harmless. */
async function answer(userId: string, requestId: string, longest: Usage, work: () => Promise<Usage>) {
  const hold = await credits.rpc("reserve", {
    p_user_id: userId,
    p_metrics: longest,
    p_idempotency_key: requestId,
  });
  if (hold.error) throw hold.error; // misuse, or no database
  if (hold.data.error) return { refused: hold.data.error }; // "insufficient_credits", …: nothing was written

  const used = await work();
  const charge = await credits
    .rpc("deduct", {
      p_user_id: userId,
      p_metrics: used,
      p_idempotency_key: requestId,
      p_reservation_id: hold.data.reservation_id ?? undefined,
    })
    .select("amount,balance_after,error,cost::text"); // a cost is exact: as text it stays so
  if (charge.error) throw charge.error;
  if (charge.data.error) throw new Error(charge.data.error); // the work is done: say so, and settle by hand
  return charge.data;
}

/** What the user himself may ask, with the token of his session. */
async function mine(token: string) {
  const user = createClient<Database>(env("SUPABASE_URL"), env("SUPABASE_ANON_KEY"), {
    ...schema,
    global: { headers: { Authorization: `Bearer ${token}` } },
  });
  const balance = await user.rpc("my_balance");
  if (balance.error) throw balance.error;
  const rows = await user.rpc("my_transactions", { p_limit: 10 });
  if (rows.error) throw rows.error;
  return { balance: balance.data.balance, rows: rows.data.map((row) => `${row.seq} ${row.type} ${row.amount}`) };
}

const userId = process.env.USER_ID ?? "alice";
const given = await credits.rpc("add_credits", {
  p_user_id: userId,
  p_amount: 1000,
  p_type: "purchase",
  p_idempotency_key: "invoice-1",
});
if (given.error) throw given.error;
if (given.data.error) throw new Error(given.data.error);

const longest = { model: "gpt-5", input_tokens: 1200, output_tokens: 4096 };
console.log(await answer(userId, "request-1", longest, async () => ({ ...longest, output_tokens: 350 })));
if (process.env.USER_TOKEN) console.log(await mine(process.env.USER_TOKEN));
