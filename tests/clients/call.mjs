// Each line of standard input is a request {client, token, name, args, select, get}; each line of standard output is
// what that client answered: {data, error, status}.
import { createInterface } from "node:readline";
import { PostgrestClient } from "@supabase/postgrest-js";
import { createClient } from "@supabase/supabase-js";

const url = process.argv[2];
const schema = "ducto";

const clients = {
  postgrest: (token) =>
    new PostgrestClient(`${url}/rest/v1`, { schema, headers: { Authorization: `Bearer ${token}` } }),
  supabase: (token) => createClient(url, token, { db: { schema }, auth: { persistSession: false } }),
};

for await (const line of createInterface({ input: process.stdin })) {
  const { client, token, name, args, select, get } = JSON.parse(line);
  let call = clients[client](token).rpc(name, args, { get });
  if (select) call = call.select(select);
  const { data, error, status } = await call;
  console.log(JSON.stringify({ data, error, status }));
}
