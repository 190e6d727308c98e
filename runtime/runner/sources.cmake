# The runtime library's sources, for this project and for applications that compile it into their own library. `folder`
# is where they lie.
function(moec_runtime_sources result folder)
  set(names moec_runtime watch shared_pages caches session session_file memory mapped_file program_file program_check program_values program_calls xnnpack_check operator_table expert_cache expert_file memory_budget)
  list(TRANSFORM names PREPEND "${folder}/")
  list(APPEND names ${folder}/../app/text_tables ${folder}/../app/normal_form ${folder}/../app/character_map ${folder}/../app/text_steps ${folder}/../app/piece_model ${folder}/../app/json_scan ${folder}/../app/tool_calls
       ${folder}/../app/segments ${folder}/../app/tokenizer ${folder}/../app/chat_form ${folder}/../app/json_tree ${folder}/../app/python_calls ${folder}/../app/tool_form ${folder}/../app/sampler ${folder}/../app/scores
       ${folder}/../app/objects ${folder}/../app/prefixes ${folder}/../app/model_draft ${folder}/../app/generation ${folder}/../app/api ${folder}/../app/api_text ${folder}/../app/api_prefixes ${folder}/../app/moec_app)
  list(TRANSFORM names APPEND ".cpp")
  set(${result} ${names} PARENT_SCOPE)
endfunction()
