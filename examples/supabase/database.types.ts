
export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  
  "ducto": {
          Tables: {
            [_ in never]: never
          }
          Views: {
            [_ in never]: never
          }
          Functions: {
            "ack_events":
{ Args: { "p_consumer"?: string,"p_ids": (string)[] }; Returns: number
                           },
"activate_pricing":
{ Args: { "p_at"?: string,"p_version": number }; Returns: Database["ducto"]['CompositeTypes']["pricing_config_result"]
                          SetofOptions: {
        from: "*"
        to: "pricing_config_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"add_credits":
{ Args: { "p_amount": number,"p_expires_at"?: string,"p_idempotency_key"?: string,"p_keep_lot"?: boolean,"p_metadata"?: Json,"p_paid_amount"?: number,"p_paid_currency"?: string,"p_reference"?: string,"p_type"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["add_credits_result"]
                          SetofOptions: {
        from: "*"
        to: "add_credits_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"add_team_member":
{ Args: { "p_role"?: string,"p_spend_cap"?: number,"p_spend_cap_period"?: string,"p_team_id": string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["add_team_member_result"]
                          SetofOptions: {
        from: "*"
        to: "add_team_member_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"aggregate_stats":
{ Args: { "p_end"?: string,"p_start"?: string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["aggregate_stats_row"]
                          SetofOptions: {
        from: "*"
        to: "aggregate_stats_row"
        isOneToOne: true
        isSetofReturn: false
      } },
"calculate_cost":
{ Args: { "p_metrics": Json,"p_plan_id"?: string,"p_user_id"?: string,"p_version"?: number }; Returns: Database["ducto"]['CompositeTypes']["cost_breakdown"]
                          SetofOptions: {
        from: "*"
        to: "cost_breakdown"
        isOneToOne: true
        isSetofReturn: false
      } },
"check_allowance":
{ Args: { "p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["allowance_result"]
                          SetofOptions: {
        from: "*"
        to: "allowance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"check_feature":
{ Args: { "p_feature": string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["check_feature_result"]
                          SetofOptions: {
        from: "*"
        to: "check_feature_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"check_spend_cap":
{ Args: { "p_amount"?: number,"p_model"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["cap_check_result"]
                          SetofOptions: {
        from: "*"
        to: "cap_check_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"create_team":
{ Args: { "p_idempotency_key"?: string,"p_initial_balance"?: number,"p_name": string,"p_team_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["create_team_result"]
                          SetofOptions: {
        from: "*"
        to: "create_team_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"daily_spend":
{ Args: { "p_end"?: string,"p_start"?: string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["daily_spend_row"][]
                          SetofOptions: {
        from: "*"
        to: "daily_spend_row"
        isOneToOne: false
        isSetofReturn: true
      } },
"deduct":
{ Args: { "p_final"?: boolean,"p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_metrics": Json,"p_occurred_at"?: string,"p_reservation_id"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["deduction_result"]
                          SetofOptions: {
        from: "*"
        to: "deduction_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"deduct_batch":
{ Args: { "p_charges": Json }; Returns: Database["ducto"]['CompositeTypes']["deduction_result"][]
                          SetofOptions: {
        from: "*"
        to: "deduction_result"
        isOneToOne: false
        isSetofReturn: true
      } },
"deduct_credits":
{ Args: { "p_amount": number,"p_final"?: boolean,"p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_model"?: string,"p_occurred_at"?: string,"p_reservation_id"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["deduction_result"]
                          SetofOptions: {
        from: "*"
        to: "deduction_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"deduct_fixed":
{ Args: { "p_idempotency_key"?: string,"p_job_name": string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_occurred_at"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["deduction_result"]
                          SetofOptions: {
        from: "*"
        to: "deduction_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"deduct_team":
{ Args: { "p_final"?: boolean,"p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_metrics": Json,"p_occurred_at"?: string,"p_reservation_id"?: string,"p_team_id": string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["team_deduction_result"]
                          SetofOptions: {
        from: "*"
        to: "team_deduction_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"deduct_team_credits":
{ Args: { "p_amount": number,"p_final"?: boolean,"p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_model"?: string,"p_occurred_at"?: string,"p_reservation_id"?: string,"p_team_id": string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["team_deduction_result"]
                          SetofOptions: {
        from: "*"
        to: "team_deduction_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"erase_user":
{ Args: { "p_user_id": string }; Returns: number
                           },
"explain_transaction":
{ Args: { "p_transaction_id": string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["explanation"]
                          SetofOptions: {
        from: "*"
        to: "explanation"
        isOneToOne: true
        isSetofReturn: false
      } },
"extend_reservation":
{ Args: { "p_add_amount"?: number,"p_idempotency_key"?: string,"p_reservation_id": string,"p_ttl_seconds"?: number,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["reserve_result"]
                          SetofOptions: {
        from: "*"
        to: "reserve_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"fail_topup":
{ Args: { "p_key": string,"p_retry_seconds"?: number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["auto_topup"]
                          SetofOptions: {
        from: "*"
        to: "auto_topup"
        isOneToOne: true
        isSetofReturn: false
      } },
"fetch_events":
{ Args: { "p_consumer"?: string,"p_lease_seconds"?: number,"p_limit"?: number }; Returns: Database["ducto"]['CompositeTypes']["event"][]
                          SetofOptions: {
        from: "*"
        to: "event"
        isOneToOne: false
        isSetofReturn: true
      } },
"freeze_account":
{ Args: { "p_frozen"?: boolean,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["balance_result"]
                          SetofOptions: {
        from: "*"
        to: "balance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_active_pricing":
{ Args: Record<PropertyKey, never>; Returns: Database["ducto"]['CompositeTypes']["pricing_config_result"]
                          SetofOptions: {
        from: "*"
        to: "pricing_config_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_auto_topup":
{ Args: { "p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["auto_topup"]
                          SetofOptions: {
        from: "*"
        to: "auto_topup"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_balance":
{ Args: { "p_at"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["balance_result"]
                          SetofOptions: {
        from: "*"
        to: "balance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_pricing_config":
{ Args: { "p_version": number }; Returns: Database["ducto"]['CompositeTypes']["pricing_config_result"]
                          SetofOptions: {
        from: "*"
        to: "pricing_config_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_pricing_history":
{ Args: Record<PropertyKey, never>; Returns: Database["ducto"]['CompositeTypes']["pricing_config_history_item"][]
                          SetofOptions: {
        from: "*"
        to: "pricing_config_history_item"
        isOneToOne: false
        isSetofReturn: true
      } },
"get_reservation":
{ Args: { "p_reservation_id": string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["reservation"]
                          SetofOptions: {
        from: "*"
        to: "reservation"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_statement":
{ Args: { "p_end": string,"p_start": string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["statement"]
                          SetofOptions: {
        from: "*"
        to: "statement"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_team":
{ Args: { "p_team_id": string }; Returns: Database["ducto"]['CompositeTypes']["team"]
                          SetofOptions: {
        from: "*"
        to: "team"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_team_balance":
{ Args: { "p_team_id": string }; Returns: Database["ducto"]['CompositeTypes']["team_balance_result"]
                          SetofOptions: {
        from: "*"
        to: "team_balance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_team_members":
{ Args: { "p_team_id": string }; Returns: Database["ducto"]['CompositeTypes']["team_member"][]
                          SetofOptions: {
        from: "*"
        to: "team_member"
        isOneToOne: false
        isSetofReturn: true
      } },
"get_transaction":
{ Args: { "p_idempotency_key"?: string,"p_transaction_id"?: string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["transaction"]
                          SetofOptions: {
        from: "*"
        to: "transaction"
        isOneToOne: true
        isSetofReturn: false
      } },
"get_user_plan":
{ Args: { "p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["get_user_plan_result"]
                          SetofOptions: {
        from: "*"
        to: "get_user_plan_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"list_reservations":
{ Args: { "p_active"?: boolean,"p_before"?: string,"p_limit"?: number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["reservation"][]
                          SetofOptions: {
        from: "*"
        to: "reservation"
        isOneToOne: false
        isSetofReturn: true
      } },
"list_spend_caps":
{ Args: { "p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["spend_cap"][]
                          SetofOptions: {
        from: "*"
        to: "spend_cap"
        isOneToOne: false
        isSetofReturn: true
      } },
"list_transactions":
{ Args: { "p_before"?: number,"p_from"?: string,"p_limit"?: number,"p_to"?: string,"p_type"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["transaction"][]
                          SetofOptions: {
        from: "*"
        to: "transaction"
        isOneToOne: false
        isSetofReturn: true
      } },
"merge_accounts":
{ Args: { "p_from": string,"p_idempotency_key"?: string,"p_into": string }; Returns: Database["ducto"]['CompositeTypes']["balance_result"]
                          SetofOptions: {
        from: "*"
        to: "balance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"my_balance":
{ Args: Record<PropertyKey, never>; Returns: Database["ducto"]['CompositeTypes']["balance_result"]
                          SetofOptions: {
        from: "*"
        to: "balance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"my_daily_spend":
{ Args: { "p_end": string,"p_start": string }; Returns: Database["ducto"]['CompositeTypes']["daily_spend_row"][]
                          SetofOptions: {
        from: "*"
        to: "daily_spend_row"
        isOneToOne: false
        isSetofReturn: true
      } },
"my_plan":
{ Args: Record<PropertyKey, never>; Returns: Database["ducto"]['CompositeTypes']["get_user_plan_result"]
                          SetofOptions: {
        from: "*"
        to: "get_user_plan_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"my_statement":
{ Args: { "p_end": string,"p_start": string }; Returns: Database["ducto"]['CompositeTypes']["statement"]
                          SetofOptions: {
        from: "*"
        to: "statement"
        isOneToOne: true
        isSetofReturn: false
      } },
"my_transactions":
{ Args: { "p_before"?: number,"p_limit"?: number }; Returns: Database["ducto"]['CompositeTypes']["transaction"][]
                          SetofOptions: {
        from: "*"
        to: "transaction"
        isOneToOne: false
        isSetofReturn: true
      } },
"read_usage":
{ Args: { "p_api"?: string,"p_body": Json,"p_model"?: string }; Returns: Json
                           },
"refund_credits":
{ Args: { "p_amount"?: number,"p_idempotency_key"?: string,"p_metadata"?: Json,"p_reason"?: string,"p_transaction_id": string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["refund_result"]
                          SetofOptions: {
        from: "*"
        to: "refund_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"release_reservation":
{ Args: { "p_reservation_id": string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["reserve_result"]
                          SetofOptions: {
        from: "*"
        to: "reserve_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"remove_auto_topup":
{ Args: { "p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["auto_topup"]
                          SetofOptions: {
        from: "*"
        to: "auto_topup"
        isOneToOne: true
        isSetofReturn: false
      } },
"remove_credits":
{ Args: { "p_amount": number,"p_idempotency_key"?: string,"p_metadata"?: Json,"p_paid_amount"?: number,"p_paid_currency"?: string,"p_reason"?: string,"p_transaction_id"?: string,"p_unspent_only"?: boolean,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["add_credits_result"]
                          SetofOptions: {
        from: "*"
        to: "add_credits_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"remove_spend_cap":
{ Args: { "p_cap_type": string,"p_label"?: string,"p_model"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["spend_cap"]
                          SetofOptions: {
        from: "*"
        to: "spend_cap"
        isOneToOne: true
        isSetofReturn: false
      } },
"remove_team_member":
{ Args: { "p_team_id": string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["add_team_member_result"]
                          SetofOptions: {
        from: "*"
        to: "add_team_member_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"reserve":
{ Args: { "p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_metrics": Json,"p_min_balance"?: number,"p_occurred_at"?: string,"p_operation_type"?: string,"p_overrun"?: string,"p_ttl_seconds"?: number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["reserve_result"]
                          SetofOptions: {
        from: "*"
        to: "reserve_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"reserve_credits":
{ Args: { "p_amount": number,"p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_min_balance"?: number,"p_model"?: string,"p_occurred_at"?: string,"p_operation_type"?: string,"p_overrun"?: string,"p_ttl_seconds"?: number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["reserve_result"]
                          SetofOptions: {
        from: "*"
        to: "reserve_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"reserve_team":
{ Args: { "p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_metrics": Json,"p_min_balance"?: number,"p_occurred_at"?: string,"p_operation_type"?: string,"p_overrun"?: string,"p_team_id": string,"p_ttl_seconds"?: number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["reserve_result"]
                          SetofOptions: {
        from: "*"
        to: "reserve_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"reserve_team_credits":
{ Args: { "p_amount": number,"p_idempotency_key"?: string,"p_labels"?: (string)[],"p_metadata"?: Json,"p_min_balance"?: number,"p_model"?: string,"p_occurred_at"?: string,"p_operation_type"?: string,"p_overrun"?: string,"p_team_id": string,"p_ttl_seconds"?: number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["reserve_result"]
                          SetofOptions: {
        from: "*"
        to: "reserve_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"rollup_usage":
{ Args: Record<PropertyKey, never>; Returns: number
                           },
"set_auto_topup":
{ Args: { "p_amount": number,"p_max_per_month"?: number,"p_threshold": number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["auto_topup"]
                          SetofOptions: {
        from: "*"
        to: "auto_topup"
        isOneToOne: true
        isSetofReturn: false
      } },
"set_credit_limit":
{ Args: { "p_limit": number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["balance_result"]
                          SetofOptions: {
        from: "*"
        to: "balance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"set_low_balance":
{ Args: { "p_threshold"?: number,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["balance_result"]
                          SetofOptions: {
        from: "*"
        to: "balance_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"set_spend_cap":
{ Args: { "p_action"?: string,"p_cap_type"?: string,"p_label"?: string,"p_limit": number,"p_model"?: string,"p_user_id": string }; Returns: Database["ducto"]['CompositeTypes']["spend_cap"]
                          SetofOptions: {
        from: "*"
        to: "spend_cap"
        isOneToOne: true
        isSetofReturn: false
      } },
"set_user_plan":
{ Args: { "p_anchor"?: string,"p_event_at"?: string,"p_idempotency_key"?: string,"p_plan_id"?: string,"p_until"?: string,"p_user_id": string,"p_when"?: string }; Returns: Database["ducto"]['CompositeTypes']["set_user_plan_result"]
                          SetofOptions: {
        from: "*"
        to: "set_user_plan_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"spend_by_label":
{ Args: { "p_end"?: string,"p_start"?: string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["spend_by_label_row"][]
                          SetofOptions: {
        from: "*"
        to: "spend_by_label_row"
        isOneToOne: false
        isSetofReturn: true
      } },
"spend_by_model":
{ Args: { "p_end"?: string,"p_start"?: string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["spend_by_model_row"][]
                          SetofOptions: {
        from: "*"
        to: "spend_by_model_row"
        isOneToOne: false
        isSetofReturn: true
      } },
"spend_by_user":
{ Args: { "p_end"?: string,"p_start"?: string,"p_user_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["spend_by_user_row"][]
                          SetofOptions: {
        from: "*"
        to: "spend_by_user_row"
        isOneToOne: false
        isSetofReturn: true
      } },
"spend_margin":
{ Args: { "p_end"?: string,"p_start"?: string }; Returns: Database["ducto"]['CompositeTypes']["spend_margin"][]
                          SetofOptions: {
        from: "*"
        to: "spend_margin"
        isOneToOne: false
        isSetofReturn: true
      } },
"sweep_expired_credits":
{ Args: { "p_dry_run"?: boolean,"p_limit"?: number }; Returns: Database["ducto"]['CompositeTypes']["sweep_result"]
                          SetofOptions: {
        from: "*"
        to: "sweep_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"top_users":
{ Args: { "p_end"?: string,"p_limit"?: number,"p_start"?: string }; Returns: Database["ducto"]['CompositeTypes']["top_user_row"][]
                          SetofOptions: {
        from: "*"
        to: "top_user_row"
        isOneToOne: false
        isSetofReturn: true
      } },
"unschedule_pricing":
{ Args: { "p_version": number }; Returns: Database["ducto"]['CompositeTypes']["pricing_config_result"]
                          SetofOptions: {
        from: "*"
        to: "pricing_config_result"
        isOneToOne: true
        isSetofReturn: false
      } },
"verify_ledger":
{ Args: { "p_account_id"?: string }; Returns: Database["ducto"]['CompositeTypes']["violation"][]
                          SetofOptions: {
        from: "*"
        to: "violation"
        isOneToOne: false
        isSetofReturn: true
      } },
"version":
{ Args: Record<PropertyKey, never>; Returns: string
                           }
          }
          Enums: {
            [_ in never]: never
          }
          CompositeTypes: {
            "add_credits_result": {
                        "transaction_id": string | null,"user_id": string | null,"amount": number | null,"new_balance": number | null,"lifetime_purchased": number | null,"idempotent": boolean | null,"revision": number | null,"error": string | null
                      },"add_team_member_result": {
                        "team_id": string | null,"user_id": string | null,"role": string | null,"error": string | null,"revision": number | null
                      },"aggregate_stats_row": {
                        "total_credits_consumed": number | null,"active_users": number | null,"avg_daily_spend": number | null,"top_model": string | null,"top_user": string | null,"allowance_used": number | null,"refunded": number | null,"cost": number | null,"error": string | null
                      },"allowance_result": {
                        "plan_id": string | null,"allowance_remaining": number | null,"period_start": string | null,"period_end": string | null,"error": string | null,"revision": number | null
                      },"auto_topup": {
                        "user_id": string | null,"threshold": number | null,"amount": number | null,"max_per_month": number | null,"status": string | null,"due_key": string | null,"this_month": number | null,"error": string | null,"revision": number | null
                      },"balance_result": {
                        "user_id": string | null,"balance": number | null,"lifetime_purchased": number | null,"reserved": number | null,"available": number | null,"credit_limit": number | null,"revision": number | null,"error": string | null,"idempotent": boolean | null
                      },"cap_check_result": {
                        "capped": boolean | null,"current_spend": number | null,"cap_limit": number | null,"action": string | null,"model": string | null,"error": string | null,"revision": number | null
                      },"check_feature_result": {
                        "user_id": string | null,"feature": string | null,"value": Json | null,"has_feature": boolean | null,"error": string | null,"revision": number | null
                      },"cost_breakdown": {
                        "model_credits": number | null,"tool_credits": number | null,"search_credits": number | null,"cache_savings": number | null,"fixed_credits": number | null,"total": number | null,"breakdown": Json | null,"resolved_model": string | null,"pricing_version": number | null,"plan_id": string | null,"error": string | null,"warnings": (string)[] | null
                      },"create_team_result": {
                        "team_id": string | null,"name": string | null,"idempotent": boolean | null,"error": string | null,"revision": number | null
                      },"daily_spend_row": {
                        "date": string | null,"total_spend": number | null,"transaction_count": number | null,"allowance_used": number | null,"refunded": number | null,"cost": number | null,"error": string | null
                      },"deduction_result": {
                        "transaction_id": string | null,"user_id": string | null,"amount": number | null,"balance_after": number | null,"idempotent": boolean | null,"error": string | null,"cost": number | null,"allowance_used": number | null,"shortfall": number | null,"warnings": (string)[] | null,"revision": number | null
                      },"event": {
                        "event_id": string | null,"type": string | null,"account_id": string | null,"payload": Json | null,"attempts": number | null,"created_at": string | null,"error": string | null
                      },"explanation": {
                        "transaction_id": string | null,"account_id": string | null,"cost": number | null,"carry_before": number | null,"carry_after": number | null,"rounding": string | null,"usage": Json | null,"pricing_version": number | null,"plan_id": string | null,"resolved_model": string | null,"formulas": Json | null,"parts": Json | null,"error": string | null,"amount": number | null,"allowance_used": number | null
                      },"get_user_plan_result": {
                        "user_id": string | null,"plan_id": string | null,"plan_name": string | null,"free_allowance": number | null,"features": Json | null,"allowance_remaining": number | null,"period_start": string | null,"period_end": string | null,"error": string | null,"revision": number | null,"next_plan_id": string | null,"next_plan_at": string | null
                      },"pricing_config_history_item": {
                        "id": string | null,"version": number | null,"label": string | null,"active": boolean | null,"created_at": string | null,"error": string | null
                      },"pricing_config_result": {
                        "id": string | null,"config": Json | null,"version": number | null,"label": string | null,"error": string | null
                      },"refund_result": {
                        "refund_transaction_id": string | null,"original_transaction_id": string | null,"user_id": string | null,"amount": number | null,"new_balance": number | null,"error": string | null,"allowance_restored": number | null,"allowance_lapsed": number | null,"idempotent": boolean | null,"revision": number | null
                      },"reservation": {
                        "reservation_id": string | null,"account_id": string | null,"actor_id": string | null,"status": string | null,"amount": number | null,"charged": number | null,"operation_type": string | null,"model": string | null,"metrics": Json | null,"pricing_version": number | null,"plan_id": string | null,"idempotency_key": string | null,"metadata": Json | null,"created_at": string | null,"expires_at": string | null,"ended_at": string | null,"error": string | null,"labels": (string)[] | null
                      },"reserve_result": {
                        "reservation_id": string | null,"user_id": string | null,"amount": number | null,"balance": number | null,"reserved_total": number | null,"error": string | null,"idempotent": boolean | null,"expires_at": string | null,"warnings": (string)[] | null,"revision": number | null
                      },"set_user_plan_result": {
                        "user_id": string | null,"plan_id": string | null,"error": string | null,"revision": number | null,"idempotent": boolean | null,"warnings": (string)[] | null,"next_plan_id": string | null,"next_plan_at": string | null
                      },"spend_by_label_row": {
                        "label": string | null,"total_spend": number | null,"transaction_count": number | null,"error": string | null
                      },"spend_by_model_row": {
                        "model": string | null,"total_spend": number | null,"transaction_count": number | null,"allowance_used": number | null,"refunded": number | null,"cost": number | null,"error": string | null
                      },"spend_by_user_row": {
                        "user_id": string | null,"total_spend": number | null,"transaction_count": number | null,"allowance_used": number | null,"refunded": number | null,"cost": number | null,"error": string | null
                      },"spend_cap": {
                        "user_id": string | null,"cap_type": string | null,"model": string | null,"limit": number | null,"action": string | null,"error": string | null,"revision": number | null,"spent": number | null,"resets_at": string | null,"label": string | null
                      },"spend_margin": {
                        "model": string | null,"transaction_count": number | null,"total_spend": number | null,"provider_cost": number | null,"uncosted": number | null,"error": string | null
                      },"statement": {
                        "user_id": string | null,"period_start": string | null,"period_end": string | null,"opening_balance": number | null,"granted": number | null,"purchased": number | null,"charged": number | null,"allowance_used": number | null,"refunded": number | null,"removed": number | null,"expired": number | null,"closing_balance": number | null,"error": string | null,"revision": number | null
                      },"sweep_result": {
                        "expired_count": number | null,"expired_amount": number | null,"dry_run": boolean | null,"error": string | null,"account_count": number | null
                      },"team": {
                        "team_id": string | null,"name": string | null,"balance": number | null,"member_count": number | null,"created_at": string | null,"error": string | null,"revision": number | null
                      },"team_balance_result": {
                        "team_id": string | null,"name": string | null,"balance": number | null,"member_count": number | null,"error": string | null,"revision": number | null
                      },"team_deduction_result": {
                        "transaction_id": string | null,"team_id": string | null,"user_id": string | null,"amount": number | null,"team_balance_after": number | null,"idempotent": boolean | null,"error": string | null,"cost": number | null,"allowance_used": number | null,"shortfall": number | null,"warnings": (string)[] | null,"revision": number | null
                      },"team_member": {
                        "user_id": string | null,"role": string | null,"spend_cap": number | null,"total_spent": number | null,"spend_cap_period": string | null,"error": string | null,"spent": number | null
                      },"top_user_row": {
                        "user_id": string | null,"total_spend": number | null,"allowance_used": number | null,"refunded": number | null,"cost": number | null,"error": string | null
                      },"transaction": {
                        "transaction_id": string | null,"account_id": string | null,"seq": number | null,"type": string | null,"amount": number | null,"balance_after": number | null,"allowance_used": number | null,"allowance_lapsed": number | null,"cost": number | null,"carry_after": number | null,"rounding": string | null,"actor_id": string | null,"model": string | null,"resolved_model": string | null,"usage": Json | null,"pricing_version": number | null,"plan_id": string | null,"reservation_id": string | null,"refers_to": string | null,"idempotency_key": string | null,"paid_amount": number | null,"paid_currency": string | null,"reference": string | null,"expires_at": string | null,"reason": string | null,"metadata": Json | null,"created_at": string | null,"error": string | null,"occurred_at": string | null,"price_error": string | null,"warnings": (string)[] | null,"labels": (string)[] | null
                      },"violation": {
                        "account_id": string | null,"invariant": string | null,"expected": string | null,"actual": string | null,"detail": string | null,"error": string | null
                      }
          }
        }
}

type DatabaseWithoutInternals = Omit<Database, '__InternalSupabase'>

type DefaultSchema = DatabaseWithoutInternals[Extract<keyof Database, "ducto">]

export type Tables<
  DefaultSchemaTableNameOrOptions extends
    | keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
        DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
      DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])[TableName] extends {
      Row: infer R
    }
    ? R
    : never
  : DefaultSchemaTableNameOrOptions extends keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
  ? (DefaultSchema["Tables"] & DefaultSchema["Views"])[DefaultSchemaTableNameOrOptions] extends {
      Row: infer R
    }
    ? R
    : never
  : never

export type TablesInsert<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Insert: infer I
    }
    ? I
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Insert: infer I
    }
    ? I
    : never
  : never

export type TablesUpdate<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Update: infer U
    }
    ? U
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Update: infer U
    }
    ? U
    : never
  : never

export type Enums<
  DefaultSchemaEnumNameOrOptions extends
    | keyof DefaultSchema["Enums"]
    | { schema: keyof DatabaseWithoutInternals },
  EnumName extends DefaultSchemaEnumNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"]
    : never = never
> = DefaultSchemaEnumNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"][EnumName]
  : DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema["Enums"]
  ? DefaultSchema["Enums"][DefaultSchemaEnumNameOrOptions]
  : never

export type CompositeTypes<
  PublicCompositeTypeNameOrOptions extends
    | keyof DefaultSchema["CompositeTypes"]
    | { schema: keyof DatabaseWithoutInternals },
  CompositeTypeName extends PublicCompositeTypeNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"]
    : never = never
> = PublicCompositeTypeNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"][CompositeTypeName]
  : PublicCompositeTypeNameOrOptions extends keyof DefaultSchema["CompositeTypes"]
  ? DefaultSchema["CompositeTypes"][PublicCompositeTypeNameOrOptions]
  : never

export const Constants = {
  "ducto": {
          Enums: {
            
          }
        }
} as const
